/** The board: shows the mask at any zoom with hard edges, and turns pointer and keyboard into strokes. */

import { colorize } from "./mask.js";
import { classAt, startStroke } from "./tools.js";

/** @typedef {import("./history.js").MaskDocument} MaskDocument */
/** @typedef {import("./tools.js").Point} Point */

const MOST_ZOOM = 16;
const ZOOM_STEP = 1.5;
const ARROWS = /** @type {Record<string, Point>} */ ({
  ArrowLeft: [-1, 0],
  ArrowRight: [1, 0],
  ArrowUp: [0, -1],
  ArrowDown: [0, 1],
});

/**
 * @typedef {object} BoardElements
 * @property {HTMLElement} frame - has the proportions of the mask.
 * @property {HTMLElement} view - scrolls, and has the keyboard's focus.
 * @property {HTMLElement} paper - as large as the zoomed mask.
 * @property {HTMLCanvasElement} canvas - one pixel per pixel of the mask; CSS enlarges it without smoothing.
 * @property {HTMLCanvasElement} overlay - outline of the brush and cursor.
 */

/**
 * @typedef {object} BoardOptions
 * @property {MaskDocument} mask
 * @property {BoardElements} elements
 * @property {() => import("./tools.js").Brush} brush
 * @property {(value: number) => void} pick - the eyedropper has taken a class.
 * @property {() => void} onStroke - a stroke has changed the mask.
 * @property {(point: Point, value: number | null) => void} onCursor - the keyboard has moved the cursor.
 * @property {(zoom: number) => void} onZoom
 */

export class Board {
  #document;
  #elements;
  #options;
  #zoom = 1;
  #colors = /** @type {Uint32Array} */ (new Uint32Array(256));
  #image = /** @type {ImageData | null} */ (null);
  #frame = 0;
  #stroke = /** @type {{move: (point: Point) => void, label: string} | null} */ (null);
  #pointers = /** @type {Map<number, PointerEvent>} */ (new Map());
  #pinch = /** @type {{distance: number, zoom: number, x: number, y: number} | null} */ (null);
  #hover = /** @type {Point | null} */ (null);
  #cursor = /** @type {Point} */ ([0, 0]);
  #isCursorShown = false;

  /** @param {BoardOptions} options */
  constructor(options) {
    this.#options = options;
    this.#document = options.mask;
    this.#elements = options.elements;
    this.#document.addEventListener("draw", () => this.refresh());
    this.#listen();
    new ResizeObserver(() => this.#layout()).observe(this.#elements.frame);
    window.addEventListener("resize", () => this.#layout()); // also if only the pixels of the device change
  }

  get zoom() {
    return this.#zoom;
  }

  /** Whether a stroke has been started and not finished. */
  get isStroking() {
    return this.#stroke !== null;
  }

  /** @param {Uint32Array} colors - per class index; see `colorWords`. */
  set colors(colors) {
    this.#colors = colors;
    this.refresh();
  }

  /** Shows the mask before the next frame. */
  refresh() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  /**
   * Zooms around a point, by default the middle of what is visible.
   * @param {number} zoom - 1 shows the whole mask.
   * @param {{x: number, y: number}} [at] - pixels of the view.
   */
  zoomTo(zoom, at) {
    const { view } = this.#elements;
    const next = Math.min(MOST_ZOOM, Math.max(1, zoom));
    const { x, y } = at ?? { x: view.clientWidth / 2, y: view.clientHeight / 2 };
    const [left, top] = [(view.scrollLeft + x) / this.#zoom, (view.scrollTop + y) / this.#zoom];
    this.#zoom = next;
    this.#layout();
    view.scrollLeft = left * next - x;
    view.scrollTop = top * next - y;
    this.#options.onZoom(next);
  }

  zoomIn() {
    this.zoomTo(this.#zoom * ZOOM_STEP);
  }

  zoomOut() {
    this.zoomTo(this.#zoom / ZOOM_STEP);
  }

  #draw() {
    const { canvas } = this.#elements;
    const { mask } = this.#document;
    if (!this.#image || canvas.width !== mask.width || canvas.height !== mask.height) {
      [canvas.width, canvas.height] = [mask.width, mask.height];
      this.#image = new ImageData(mask.width, mask.height);
      this.#cursor = [mask.width >> 1, mask.height >> 1];
      this.#zoom = 1;
      this.#layout();
      this.#options.onZoom(1);
    }
    colorize(mask, this.#colors, this.#image.data);
    canvas.getContext("2d")?.putImageData(this.#image, 0, 0);
    this.#drawOverlay();
  }

  #layout() {
    const { frame, view, paper, overlay } = this.#elements;
    const { width, height } = this.#document.mask;
    frame.style.aspectRatio = `${width} / ${height}`;
    paper.style.width = `${view.clientWidth * this.#zoom}px`;
    paper.style.height = `${view.clientHeight * this.#zoom}px`;
    const scale = window.devicePixelRatio;
    overlay.width = Math.round(view.clientWidth * scale);
    overlay.height = Math.round(view.clientHeight * scale);
    this.#drawOverlay();
  }

  #drawOverlay() {
    const { overlay, view } = this.#elements;
    const { width } = this.#document.mask;
    const context = overlay.getContext("2d");
    if (!context || !width) return;
    const device = window.devicePixelRatio;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, overlay.width, overlay.height);
    context.scale(device, device);
    context.translate(-view.scrollLeft, -view.scrollTop);
    const scale = (view.clientWidth * this.#zoom) / width;
    const brush = this.#options.brush();
    if (brush.isMirrored) this.#outline(context, () => this.#axis(context, (width / 2) * scale));
    const at = this.#isCursorShown ? this.#cursor : this.#hover;
    if (!at) return;
    const hasWidth = ["brush", "eraser", "line"].includes(brush.tool);
    const radius = hasWidth ? Math.max(2, (brush.size / 2) * scale) : 0;
    const places = brush.isMirrored && brush.tool !== "eyedropper" ? [at[0], width - 1 - at[0]] : [at[0]];
    for (const column of places) {
      const [x, y] = [(column + 0.5) * scale, (at[1] + 0.5) * scale];
      if (radius) this.#outline(context, () => context.arc(x, y, radius, 0, 2 * Math.PI));
      if (!radius || this.#isCursorShown) this.#outline(context, () => this.#cross(context, x, y));
    }
  }

  /**
   * Strokes a path in white on black, which is seen on every colour.
   * @param {CanvasRenderingContext2D} context
   * @param {() => void} path
   */
  #outline(context, path) {
    context.beginPath();
    path();
    context.strokeStyle = "rgba(0, 0, 0, 0.75)";
    context.lineWidth = 3.5;
    context.stroke();
    context.strokeStyle = "#fff";
    context.lineWidth = 1.5;
    context.stroke();
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {number} x
   */
  #axis(context, x) {
    const height = this.#elements.view.clientHeight * this.#zoom;
    for (let y = 0; y < height; y += 14) {
      context.moveTo(x, y);
      context.lineTo(x, y + 6);
    }
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {number} x
   * @param {number} y
   */
  #cross(context, x, y) {
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + 3 * dx, y + 3 * dy);
      context.lineTo(x + 9 * dx, y + 9 * dy);
    }
  }

  #listen() {
    const { view } = this.#elements;
    view.addEventListener("pointerdown", (event) => this.#press(event));
    view.addEventListener("pointermove", (event) => this.#drag(event));
    view.addEventListener("pointerup", (event) => this.#release(event));
    view.addEventListener("pointercancel", (event) => this.#release(event, { isCancelled: true }));
    view.addEventListener("pointerleave", () => {
      this.#hover = null;
      this.#drawOverlay();
    });
    view.addEventListener("scroll", () => this.#drawOverlay(), { passive: true });
    view.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    view.addEventListener("keydown", (event) => this.#key(event));
    view.addEventListener("keyup", (event) => {
      if (event.key === " " && this.#stroke && !this.#isShape()) this.finish();
    });
    view.addEventListener("focus", () => {
      if (view.matches(":focus-visible")) this.#showCursor();
    });
    view.addEventListener("blur", () => {
      this.finish();
      this.#isCursorShown = false;
      this.#drawOverlay();
    });
  }

  /**
   * Returns the pixel of the mask under a pointer; it may lie outside of the mask.
   * @param {PointerEvent} event
   * @returns {Point}
   */
  #pointOf(event) {
    const area = this.#elements.canvas.getBoundingClientRect();
    const { width, height } = this.#document.mask;
    return [
      Math.floor(((event.clientX - area.left) / area.width) * width),
      Math.floor(((event.clientY - area.top) / area.height) * height),
    ];
  }

  /** @param {PointerEvent} event */
  #press(event) {
    const { view } = this.#elements;
    this.#pointers.set(event.pointerId, event);
    view.setPointerCapture(event.pointerId);
    if (this.#pointers.size === 2) {
      this.abandon();
      this.#pinch = { ...this.#fingers(), zoom: this.#zoom };
      return;
    }
    if (event.button !== 0 || this.#pointers.size > 2) return;
    event.preventDefault();
    view.focus({ preventScroll: true });
    this.#isCursorShown = false;
    this.#hover = event.pointerType === "touch" ? null : this.#pointOf(event);
    this.begin(this.#pointOf(event));
  }

  /** @param {PointerEvent} event */
  #drag(event) {
    if (this.#pointers.has(event.pointerId)) this.#pointers.set(event.pointerId, event);
    if (this.#pinch && this.#pointers.size === 2) {
      const { view } = this.#elements;
      const { distance, x, y } = this.#fingers();
      const area = view.getBoundingClientRect();
      view.scrollLeft -= x - this.#pinch.x;
      view.scrollTop -= y - this.#pinch.y;
      this.zoomTo((this.#pinch.zoom * distance) / this.#pinch.distance, { x: x - area.left, y: y - area.top });
      Object.assign(this.#pinch, { x, y });
      return;
    }
    if (event.pointerType !== "touch") this.#hover = this.#pointOf(event);
    this.#isCursorShown = false;
    if (this.#stroke && this.#pointers.has(event.pointerId)) {
      const parts = event.getCoalescedEvents?.() ?? [];
      for (const part of parts.length ? parts : [event]) this.#stroke.move(this.#pointOf(part));
    }
    this.refresh();
  }

  /**
   * @param {PointerEvent} event
   * @param {{isCancelled?: boolean}} [options]
   */
  #release(event, { isCancelled = false } = {}) {
    if (!this.#pointers.delete(event.pointerId)) return;
    if (this.#pinch) {
      if (this.#pointers.size === 0) this.#pinch = null;
    } else if (isCancelled) {
      this.abandon();
    } else {
      this.finish();
    }
  }

  /** Distance and middle of two fingers, in pixels of the window. */
  #fingers() {
    const [a, b] = [...this.#pointers.values()];
    return {
      distance: Math.max(1, Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY)),
      x: (a.clientX + b.clientX) / 2,
      y: (a.clientY + b.clientY) / 2,
    };
  }

  /** @param {WheelEvent} event */
  #wheel(event) {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const area = this.#elements.view.getBoundingClientRect();
    const at = { x: event.clientX - area.left, y: event.clientY - area.top };
    this.zoomTo(this.#zoom * Math.exp(-event.deltaY / 300), at);
  }

  /**
   * Starts a stroke.
   * @param {Point} point
   */
  begin(point) {
    this.#stroke = startStroke(this.#document, this.#options.brush(), point, this.#options.pick);
  }

  /** Finishes the stroke, if there is one. */
  finish() {
    if (!this.#stroke) return;
    const { label } = this.#stroke;
    this.#stroke = null;
    if (label && this.#document.commit(label)) this.#options.onStroke();
  }

  /** Takes the stroke back. */
  abandon() {
    if (!this.#stroke) return;
    this.#stroke = null;
    this.#document.revert();
  }

  #isShape() {
    return ["line", "ellipse"].includes(this.#options.brush().tool);
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    if (event.ctrlKey || event.metaKey || event.isComposing) return;
    if (event.key in ARROWS) {
      event.preventDefault();
      this.#moveCursor(ARROWS[event.key], event);
    } else if (event.key === " " || event.key === "Enter") {
      event.preventDefault();
      if (event.repeat) return;
      this.#showCursor();
      if (this.#stroke) return this.finish();
      this.begin(this.#cursor);
      // Space paints as long as it is held, Enter until it is pressed again; a shape waits for its other end.
      const isMomentary = ["fill", "eyedropper"].includes(this.#options.brush().tool);
      if (isMomentary) this.finish();
    } else if (event.key === "Escape" && this.#stroke) {
      event.preventDefault();
      this.abandon();
    }
  }

  /**
   * @param {Point} direction
   * @param {{shiftKey: boolean, altKey: boolean}} keys - shift: far, alt: one pixel.
   */
  #moveCursor([dx, dy], { shiftKey, altKey }) {
    const { width, height } = this.#document.mask;
    const usual = Math.max(1, Math.round(Math.max(width, height) / 64));
    const by = altKey ? 1 : shiftKey ? 6 * usual : usual;
    const [x, y] = this.#cursor;
    this.#cursor = [Math.min(width - 1, Math.max(0, x + dx * by)), Math.min(height - 1, Math.max(0, y + dy * by))];
    this.#stroke?.move(this.#cursor);
    this.#showCursor();
    this.#options.onCursor(this.#cursor, classAt(this.#document.mask, this.#cursor));
  }

  #showCursor() {
    this.#isCursorShown = true;
    const { view } = this.#elements;
    const scale = (view.clientWidth * this.#zoom) / this.#document.mask.width;
    const margin = 40;
    const [x, y] = this.#cursor.map((part) => (part + 0.5) * scale);
    view.scrollLeft = Math.min(x - margin, Math.max(view.scrollLeft, x + margin - view.clientWidth));
    view.scrollTop = Math.min(y - margin, Math.max(view.scrollTop, y + margin - view.clientHeight));
    this.#drawOverlay();
  }
}
