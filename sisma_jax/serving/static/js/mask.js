/** Masks: class indices in rows. They are the truth; canvases only show them. No DOM here. */

/**
 * @typedef {object} Mask
 * @property {number} width - pixels.
 * @property {number} height - pixels.
 * @property {Uint8Array<ArrayBuffer>} data - class indices, row by row, width * height.
 */

/**
 * @typedef {object} Patch - a rectangle of a mask before and after a change.
 * @property {number} x
 * @property {number} y
 * @property {number} width
 * @property {number} height
 * @property {Uint8Array<ArrayBuffer>} before
 * @property {Uint8Array<ArrayBuffer>} after
 */

/**
 * Returns a mask of one class.
 * @param {number} width
 * @param {number} height
 * @param {number} [value]
 * @returns {Mask}
 */
export function blankMask(width, height, value = 0) {
  return { width, height, data: new Uint8Array(width * height).fill(value) };
}

/**
 * @param {Mask} mask
 * @returns {Mask}
 */
export function copyMask(mask) {
  return { ...mask, data: mask.data.slice() };
}

/**
 * @param {Mask} a
 * @param {Mask} b
 */
export function equalMasks(a, b) {
  return a.width === b.width && a.height === b.height && a.data.every((value, i) => value === b.data[i]);
}

/**
 * Returns the smallest rectangle in which two masks of the same size differ, or null if they are equal.
 * @param {Mask} mask
 * @param {Uint8Array<ArrayBuffer>} before
 * @param {Uint8Array<ArrayBuffer>} after
 * @returns {Patch | null}
 */
export function difference({ width, height }, before, after) {
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (before[i] === after[i]) continue;
      if (x < left) left = x;
      if (x > right) right = x;
      if (y < top) top = y;
      bottom = y;
    }
  }
  if (right < 0) return null;
  const area = { x: left, y: top, width: right - left + 1, height: bottom - top + 1 };
  return { ...area, before: cut(before, width, area), after: cut(after, width, area) };
}

/**
 * @param {Uint8Array<ArrayBuffer>} data
 * @param {number} stride
 * @param {{x: number, y: number, width: number, height: number}} area
 */
function cut(data, stride, { x, y, width, height }) {
  const piece = new Uint8Array(width * height);
  for (let row = 0; row < height; row++) {
    const start = (y + row) * stride + x;
    piece.set(data.subarray(start, start + width), row * width);
  }
  return piece;
}

/**
 * Writes one side of a patch into a mask.
 * @param {Mask} mask
 * @param {Patch} patch
 * @param {"before" | "after"} side
 */
export function applyPatch(mask, patch, side) {
  for (let row = 0; row < patch.height; row++) {
    const piece = patch[side].subarray(row * patch.width, (row + 1) * patch.width);
    mask.data.set(piece, (patch.y + row) * mask.width + patch.x);
  }
}

/**
 * Returns a mask at another size. The nearest pixel is taken, so no class appears that was not there.
 * @param {Mask} mask
 * @param {number} width
 * @param {number} height
 * @returns {Mask}
 */
export function resizeMask(mask, width, height) {
  const resized = blankMask(width, height);
  for (let y = 0, i = 0; y < height; y++) {
    const row = Math.floor(((y + 0.5) * mask.height) / height) * mask.width;
    for (let x = 0; x < width; x++, i++) {
      resized.data[i] = mask.data[row + Math.floor(((x + 0.5) * mask.width) / width)];
    }
  }
  return resized;
}

/**
 * Returns the central square, as the server crops a mask that is not square.
 * @param {Mask} mask
 * @returns {Mask}
 */
export function centralSquare(mask) {
  const side = Math.min(mask.width, mask.height);
  const area = { x: (mask.width - side) >> 1, y: (mask.height - side) >> 1, width: side, height: side };
  return side === mask.width && side === mask.height
    ? mask
    : { width: side, height: side, data: cut(mask.data, mask.width, area) };
}

/**
 * Returns the size of the canvas for a mask of the given proportions.
 * @param {number} width
 * @param {number} height
 * @param {number} longest - pixels of the longer side.
 * @returns {[number, number]}
 */
export function fitted(width, height, longest) {
  const scale = longest / Math.max(width, height);
  return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
}

/**
 * Writes the colours of a mask into RGBA samples.
 * @param {Mask} mask
 * @param {Uint32Array} colors - one per class index, as the samples lie in memory.
 * @param {Uint8ClampedArray} samples - 4 per pixel.
 */
export function colorize(mask, colors, samples) {
  const words = new Uint32Array(samples.buffer, samples.byteOffset, mask.data.length);
  for (let i = 0; i < words.length; i++) words[i] = colors[mask.data[i]];
}
