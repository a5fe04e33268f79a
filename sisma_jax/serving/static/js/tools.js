/** The tools: what a press, a move and a release of the pointer do to the mask. No DOM here. */

import { ellipse, flood, painter, segment } from "./drawing.js";

/** @typedef {import("./mask.js").Mask} Mask */
/** @typedef {[number, number]} Point - whole pixels of the mask. */
/** @typedef {"brush" | "fill" | "line" | "ellipse" | "eraser" | "eyedropper"} Tool */

/** @type {readonly Tool[]} */
export const TOOLS = ["brush", "fill", "line", "ellipse", "eraser", "eyedropper"];

/**
 * @typedef {object} Brush
 * @property {Tool} tool
 * @property {number} value - class index to paint.
 * @property {number} background - class index of the eraser.
 * @property {number} size - width of brush, eraser and line, in pixels.
 * @property {boolean} isMirrored - also paint the other half, in the classes of the other side.
 * @property {number[]} otherSides - class index on the other side, per class index.
 */

/**
 * @typedef {object} Canvas - what a stroke changes; a `MaskDocument` is one.
 * @property {Mask} mask
 * @property {() => void} rewind - restores the pixels before the stroke.
 * @property {() => void} touch - the pixels have changed.
 */

/** What was done, for undo. */
const LABELS = { brush: "brush stroke", fill: "fill", line: "line", ellipse: "ellipse", eraser: "eraser stroke" };

/**
 * A stroke of a tool, from press to release.
 * @param {Canvas} canvas
 * @param {Brush} brush
 * @param {Point} start
 * @param {(value: number) => void} pick - is called by the eyedropper with the class index under it.
 * @returns {{move: (point: Point) => void, label: string}}
 */
export function startStroke(canvas, brush, start, pick) {
  const { tool } = brush;
  const { mask } = canvas;
  if (tool === "eyedropper") {
    const take = (/** @type {Point} */ point) => {
      const value = classAt(mask, point);
      if (value !== null) pick(value);
    };
    take(start);
    return { move: take, label: "" };
  }
  const value = tool === "eraser" ? brush.background : brush.value;
  const other = brush.otherSides[value];
  const paint = painter(mask, value, brush.isMirrored ? other : null);
  if (tool === "fill") {
    fill(mask, start, value, brush.isMirrored ? other : null);
    canvas.touch();
    return { move() {}, label: LABELS.fill };
  }
  if (tool === "line" || tool === "ellipse") {
    const draw = (/** @type {Point} */ end) => {
      canvas.rewind();
      if (tool === "line") segment(mask, start, end, brush.size, paint);
      else ellipse(mask, start, end, paint);
      canvas.touch();
    };
    draw(start);
    return { move: draw, label: LABELS[tool] };
  }
  let last = start;
  const draw = (/** @type {Point} */ point) => {
    segment(mask, last, point, brush.size, paint);
    last = point;
    canvas.touch();
  };
  draw(start);
  return { move: draw, label: LABELS[tool] };
}

/**
 * @param {Mask} mask
 * @param {Point} start
 * @param {number} value
 * @param {number | null} other - class index for the mirrored point, or null.
 */
function fill(mask, start, value, other) {
  if (classAt(mask, start) === null) return;
  const mirroredStart = /** @type {Point} */ ([mask.width - 1 - start[0], start[1]]);
  const areas = other === null ? [[start, value]] : [[start, value], [mirroredStart, other]];
  // Both areas are found before either is painted: on the axis they are the same.
  const spans = areas.map(([point, label]) => {
    const found = /** @type {[number, number, number][]} */ ([]);
    flood(mask, /** @type {Point} */ (point), (y, from, to) => found.push([y, from, to]));
    return { found, paint: painter(mask, /** @type {number} */ (label), null) };
  });
  for (const { found, paint } of spans.reverse()) found.forEach((span) => paint(...span));
}

/**
 * Returns the class index at a point, or null outside of the mask.
 * @param {Mask} mask
 * @param {Point} point
 */
export function classAt({ width, height, data }, [x, y]) {
  return x >= 0 && y >= 0 && x < width && y < height ? data[y * width + x] : null;
}
