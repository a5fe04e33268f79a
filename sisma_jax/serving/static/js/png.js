/** PNG files of class indices. The browser's own decoder returns colours, so that indices would be lost. No DOM here. */

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const CHANNELS = /** @type {Record<number, number>} */ ({ 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 });

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

/** @param {Uint8Array<ArrayBuffer>} bytes */
function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC_TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

/**
 * Returns bytes that went through a stream of the Compression Streams API.
 * @param {Uint8Array<ArrayBuffer>} bytes
 * @param {CompressionStream | DecompressionStream} stream
 * @param {number} [most] - bytes of the result.
 * @throws {Error} the data is damaged, or the result is larger than `most`.
 */
export async function transformed(bytes, stream, most = Infinity) {
  const writer = stream.writable.getWriter();
  const wrote = writer.write(bytes).then(() => writer.close());
  const parts = [];
  let length = 0;
  const reader = stream.readable.getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      length += part.value.length;
      if (length > most) throw new Error(`the data is larger than ${most} bytes`);
      parts.push(part.value);
    }
  } finally {
    wrote.catch(() => {});
    reader.cancel().catch(() => {});
  }
  const result = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    result.set(part, at);
    at += part.length;
  }
  return result;
}

/**
 * Returns a grey PNG file of 8 bits whose samples are the class indices.
 * @param {import("./mask.js").Mask} mask
 * @returns {Promise<Uint8Array<ArrayBuffer>>}
 */
export async function encodeMask({ width, height, data }) {
  const rows = new Uint8Array((width + 1) * height); // each row starts with the number of its filter, 0: none
  for (let y = 0; y < height; y++) rows.set(data.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  header.set([8, 0, 0, 0, 0], 8);
  const chunks = /** @type {[string, Uint8Array<ArrayBuffer>][]} */ ([
    ["IHDR", header],
    ["IDAT", await transformed(rows, new CompressionStream("deflate"))],
    ["IEND", new Uint8Array()],
  ]);
  const length = chunks.reduce((sum, [, content]) => sum + 12 + content.length, SIGNATURE.length);
  const file = new Uint8Array(length);
  const words = new DataView(file.buffer);
  file.set(SIGNATURE);
  let at = SIGNATURE.length;
  for (const [name, content] of chunks) {
    words.setUint32(at, content.length);
    file.set([...name].map((letter) => letter.charCodeAt(0)), at + 4);
    file.set(content, at + 8);
    words.setUint32(at + 8 + content.length, crc32(file.subarray(at + 4, at + 8 + content.length)));
    at += 12 + content.length;
  }
  return file;
}

/**
 * @typedef {object} Raster - the samples of a PNG file, before any palette or colour management.
 * @property {number} width
 * @property {number} height
 * @property {number} channels - 1 grey or palette indices, 2 grey and alpha, 3 RGB, 4 RGBA.
 * @property {Uint8Array<ArrayBuffer> | Uint16Array} samples - row by row, `channels` per pixel.
 * @property {[number, number, number][] | null} palette
 */

/**
 * Reads a PNG file of any bit depth and colour type.
 * @param {Uint8Array<ArrayBuffer>} file
 * @param {number} mostPixels
 * @returns {Promise<Raster>}
 * @throws {Error} the file is no PNG, is damaged, too large or interlaced.
 */
export async function decodePng(file, mostPixels) {
  if (!SIGNATURE.every((byte, i) => file[i] === byte)) throw new Error("the file is no PNG");
  const view = new DataView(file.buffer, file.byteOffset, file.length);
  let header = null;
  let palette = null;
  const parts = [];
  for (let at = SIGNATURE.length; at + 12 <= file.length; ) {
    const length = view.getUint32(at);
    const name = String.fromCharCode(...file.subarray(at + 4, at + 8));
    if (at + 12 + length > file.length) throw new Error("the file ends too early");
    const content = file.subarray(at + 8, at + 8 + length);
    if (name === "IHDR") header = content;
    if (name === "PLTE") palette = colorsOf(content);
    if (name === "IDAT") parts.push(content);
    if (name === "IEND") break;
    at += 12 + length;
  }
  if (!header || header.length < 13 || !parts.length) throw new Error("the file ends too early");
  const [width, height] = [view.getUint32(16), view.getUint32(20)];
  const [depth, type, , , interlaced] = header.subarray(8);
  const channels = CHANNELS[type];
  if (!channels || !width || !height) throw new Error("the file is damaged");
  if (interlaced) throw new Error("the file is interlaced; save it without interlacing");
  if (width * height > mostPixels) throw new Error(`the image has more than ${mostPixels} pixels`);
  const stride = Math.ceil((width * channels * depth) / 8);
  const packed = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((at, part) => (packed.set(part, at), at + part.length), 0);
  const rows = await transformed(packed, new DecompressionStream("deflate"), (stride + 1) * height);
  if (rows.length !== (stride + 1) * height) throw new Error("the file ends too early");
  const bytes = unfiltered(rows, stride, height, Math.max(1, (channels * depth) >> 3));
  return { width, height, channels, samples: samplesOf(bytes, stride, width * channels, height, depth), palette };
}

/**
 * @param {Uint8Array<ArrayBuffer>} content
 * @returns {[number, number, number][]}
 */
function colorsOf(content) {
  return Array.from({ length: Math.floor(content.length / 3) }, (_, i) => [
    content[3 * i],
    content[3 * i + 1],
    content[3 * i + 2],
  ]);
}

/**
 * Undoes the filters of the rows (PNG specification, section 9).
 * @param {Uint8Array<ArrayBuffer>} rows - each with the number of its filter before it.
 * @param {number} stride - bytes per row.
 * @param {number} height
 * @param {number} pixel - bytes per pixel, at least 1.
 */
function unfiltered(rows, stride, height, pixel) {
  const bytes = new Uint8Array(stride * height);
  for (let y = 0; y < height; y++) {
    const filter = rows[y * (stride + 1)];
    const [from, to] = [y * (stride + 1) + 1, y * stride];
    for (let x = 0; x < stride; x++) {
      const left = x >= pixel ? bytes[to + x - pixel] : 0;
      const up = y ? bytes[to + x - stride] : 0;
      const corner = y && x >= pixel ? bytes[to + x - stride - pixel] : 0;
      const predicted = [0, left, up, (left + up) >> 1, paeth(left, up, corner)][filter];
      if (predicted === undefined) throw new Error("the file is damaged");
      bytes[to + x] = rows[from + x] + predicted;
    }
  }
  return bytes;
}

/**
 * @param {number} left
 * @param {number} up
 * @param {number} corner
 */
function paeth(left, up, corner) {
  const [a, b, c] = [Math.abs(up - corner), Math.abs(left - corner), Math.abs(left + up - 2 * corner)];
  return a <= b && a <= c ? left : b <= c ? up : corner;
}

/**
 * Returns one number per sample, for 1 to 16 bits.
 * @param {Uint8Array<ArrayBuffer>} bytes
 * @param {number} stride
 * @param {number} perRow - samples per row.
 * @param {number} height
 * @param {number} depth - bits.
 */
function samplesOf(bytes, stride, perRow, height, depth) {
  if (depth === 8) return bytes;
  const samples = depth === 16 ? new Uint16Array(perRow * height) : new Uint8Array(perRow * height);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < perRow; x++, i++) {
      if (depth === 16) {
        samples[i] = (bytes[y * stride + 2 * x] << 8) | bytes[y * stride + 2 * x + 1];
      } else {
        const bit = x * depth;
        samples[i] = (bytes[y * stride + (bit >> 3)] >> (8 - depth - (bit & 7))) & ((1 << depth) - 1);
      }
    }
  }
  return samples;
}
