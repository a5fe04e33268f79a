/** The faces: one shown large, the variations below it. */

import { byId, element } from "./dom.js";

/** @typedef {import("./store.js").Store<import("./state.js").State>} Store */

/** Draws faces onto canvases, so that one replaces another without a flicker. */
export class FaceView {
  #store;
  #canvas = /** @type {HTMLCanvasElement} */ (byId("face"));
  #list = byId("variations");
  #bitmaps = /** @type {ImageBitmap[]} */ ([]);

  /** @param {Store} store */
  constructor(store) {
    this.#store = store;
    this.#list.addEventListener("change", (event) => {
      store.set({ selected: Number(/** @type {HTMLInputElement} */ (event.target).value) });
    });
    store.watch(["seeds"], ({ seeds }) => this.#layOut(seeds));
    store.watch(["selected", "seeds"], () => this.#draw());
  }

  /**
   * Shows images, one per seed.
   * @param {Blob[]} images
   * @param {AbortSignal} signal - if it is aborted meanwhile, nothing is shown.
   */
  async show(images, signal) {
    const bitmaps = await Promise.all(images.map((image) => createImageBitmap(image)));
    signal.throwIfAborted();
    this.showBitmaps(bitmaps);
  }

  /** @param {number} version - of the mask to which the finished faces belong. */
  set version(version) {
    this.#canvas.dataset.version = String(version);
    this.#canvas.dispatchEvent(new CustomEvent("finished", { bubbles: true }));
  }

  /** @param {ImageBitmap[]} bitmaps */
  showBitmaps(bitmaps) {
    this.#bitmaps = bitmaps;
    this.#draw();
    this.#canvas.dispatchEvent(new CustomEvent("face", { bubbles: true }));
  }

  /** @param {number[]} seeds */
  #layOut(seeds) {
    this.#bitmaps.length = Math.min(this.#bitmaps.length, seeds.length);
    this.#list.hidden = seeds.length < 2;
    if (this.#list.querySelectorAll("label").length === seeds.length) return;
    this.#list.querySelectorAll("label").forEach((label) => label.remove());
    this.#list.append(
      ...seeds.map((_, index) => {
        const input = element("input", { type: "radio", name: "variation", value: String(index) });
        input.setAttribute("aria-label", `Variation ${index + 1}`);
        const canvas = element("canvas", { width: 1, height: 1, "aria-hidden": "true" });
        return element("label", { className: "thumb" }, input, canvas);
      }),
    );
  }

  #draw() {
    const { selected } = this.#store.get();
    const main = this.#bitmaps[selected] ?? this.#bitmaps[0];
    if (main) drawInto(this.#canvas, main);
    [...this.#list.querySelectorAll("label")].forEach((label, index) => {
      const bitmap = this.#bitmaps[index];
      const [input, canvas] = [label.querySelector("input"), label.querySelector("canvas")];
      if (input) input.checked = index === selected;
      if (bitmap && canvas) drawInto(canvas, bitmap);
    });
  }
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {ImageBitmap} bitmap
 */
function drawInto(canvas, bitmap) {
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  }
  canvas.getContext("2d")?.drawImage(bitmap, 0, 0);
}
