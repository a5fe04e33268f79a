/**
 * Shapes with hard edges, as horizontal spans of pixels. A pixel belongs to a shape as a whole or not at all.
 * Coordinates are pixels: (0, 0) is the centre of the first pixel. No DOM here.
 */

/** @typedef {import("./mask.js").Mask} Mask */

/**
 * @callback Span - a run of pixels, inside the mask.
 * @param {number} y
 * @param {number} from - first column.
 * @param {number} to - last column.
 * @returns {void}
 */

/**
 * Returns a function that paints spans, and mirrored ones in the class of the other side.
 * @param {Mask} mask
 * @param {number} value - class index.
 * @param {number | null} mirrored - class index on the other side of the vertical axis, or null to paint one side.
 * @returns {Span}
 */
export function painter(mask, value, mirrored) {
  const { width, data } = mask;
  return (y, from, to) => {
    data.fill(value, y * width + from, y * width + to + 1);
    if (mirrored !== null) data.fill(mirrored, y * width + width - 1 - to, y * width + width - from);
  };
}

/**
 * Calls `paint` with the span that a shape has in a row, clipped to the mask.
 * @param {Mask} mask
 * @param {number} y
 * @param {number} from - may be a fraction; pixels whose centre is in [from, to] belong to the shape.
 * @param {number} to
 * @param {Span} paint
 */
function clipped({ width, height }, y, from, to, paint) {
  const first = Math.max(0, Math.ceil(from));
  const last = Math.min(width - 1, Math.floor(to));
  if (y >= 0 && y < height && first <= last) paint(y, first, last);
}

/**
 * A line with round ends: the pixels near the segment, and at least one per step.
 * @param {Mask} mask
 * @param {[number, number]} start - whole numbers.
 * @param {[number, number]} end - whole numbers.
 * @param {number} thickness - pixels; odd numbers are exact, since lines lie on centres of pixels.
 * @param {Span} paint
 */
export function segment(mask, [x0, y0], [x1, y1], thickness, paint) {
  const radius = thickness / 2 - 0.25; // at half the width, round ends would have tips of one pixel
  const [dx, dy] = [x1 - x0, y1 - y0];
  const length = Math.hypot(dx, dy);
  const top = Math.floor(Math.min(y0, y1) - radius);
  const bottom = Math.ceil(Math.max(y0, y1) + radius);
  for (let y = Math.max(0, top); y <= Math.min(mask.height - 1, bottom); y++) {
    let [from, to] = [Infinity, -Infinity];
    const include = (/** @type {number} */ a, /** @type {number} */ b) => {
      from = Math.min(from, a);
      to = Math.max(to, b);
    };
    for (const [x, centre] of [[x0, y0], [x1, y1]]) {
      const half = radius ** 2 - (y - centre) ** 2;
      if (half >= 0) include(x - Math.sqrt(half), x + Math.sqrt(half));
    }
    if (length > 0) {
      // The band between the ends: |cross| <= radius * length, and 0 <= dot <= length ** 2.
      const band = intersection(
        bounds(-dy, dx * (y - y0), -radius * length, radius * length),
        bounds(dx, dy * (y - y0), 0, length ** 2),
      );
      if (band) include(band[0] + x0, band[1] + x0);
    }
    clipped(mask, y, from, to, paint);
  }
  thinLine(mask, [x0, y0], [x1, y1], paint);
}

/**
 * Returns the interval of u with low <= slope * u + offset <= high, or null.
 * @param {number} slope
 * @param {number} offset
 * @param {number} low
 * @param {number} high
 * @returns {[number, number] | null}
 */
function bounds(slope, offset, low, high) {
  if (slope === 0) return offset >= low && offset <= high ? [-Infinity, Infinity] : null;
  const [a, b] = [(low - offset) / slope, (high - offset) / slope];
  return [Math.min(a, b), Math.max(a, b)];
}

/**
 * @param {[number, number] | null} a
 * @param {[number, number] | null} b
 * @returns {[number, number] | null}
 */
function intersection(a, b) {
  if (!a || !b) return null;
  const [from, to] = [Math.max(a[0], b[0]), Math.min(a[1], b[1])];
  return from <= to ? [from, to] : null;
}

/**
 * One pixel per step along the longer direction (Bresenham).
 * @param {Mask} mask
 * @param {[number, number]} start
 * @param {[number, number]} end
 * @param {Span} paint
 */
function thinLine(mask, [x0, y0], [x1, y1], paint) {
  const steps = Math.max(Math.abs(x1 - x0), Math.abs(y1 - y0));
  for (let i = 0; i <= steps; i++) {
    const along = steps ? i / steps : 0;
    const x = Math.round(x0 + (x1 - x0) * along);
    clipped(mask, Math.round(y0 + (y1 - y0) * along), x, x, paint);
  }
}

/**
 * A filled ellipse in the rectangle of two corners, which belong to it.
 * @param {Mask} mask
 * @param {[number, number]} start
 * @param {[number, number]} end
 * @param {Span} paint
 */
export function ellipse(mask, [x0, y0], [x1, y1], paint) {
  const [cx, cy] = [(x0 + x1) / 2, (y0 + y1) / 2];
  const [rx, ry] = [(Math.abs(x1 - x0) + 1) / 2, (Math.abs(y1 - y0) + 1) / 2];
  for (let y = Math.min(y0, y1); y <= Math.max(y0, y1); y++) {
    const half = rx * Math.sqrt(Math.max(0, 1 - ((y - cy) / ry) ** 2));
    clipped(mask, y, cx - half, cx + half, paint);
  }
}

/**
 * The connected area (4 neighbours) of one class around a pixel.
 * @param {Mask} mask - is read before it is painted.
 * @param {[number, number]} start
 * @param {Span} paint
 */
export function flood(mask, [x, y], paint) {
  const { width, height, data } = mask;
  const value = data[y * width + x];
  const seen = new Uint8Array(data.length);
  const spans = [];
  const open = [[x, y]];
  for (let next = open.pop(); next; next = open.pop()) {
    const row = next[1] * width;
    if (seen[row + next[0]]) continue;
    let [from, to] = [next[0], next[0]];
    while (from > 0 && data[row + from - 1] === value) from--;
    while (to < width - 1 && data[row + to + 1] === value) to++;
    seen.fill(1, row + from, row + to + 1);
    spans.push([next[1], from, to]);
    for (const other of [next[1] - 1, next[1] + 1]) {
      if (other < 0 || other >= height) continue;
      for (let i = from; i <= to; i++) {
        const at = other * width + i;
        const starts = i === from || data[at - 1] !== value;
        if (data[at] === value && !seen[at] && starts) open.push([i, other]);
      }
    }
  }
  for (const [row, from, to] of spans) paint(row, from, to);
}
