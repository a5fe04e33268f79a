/** The mask that is painted, with what was done to it. */

import { applyPatch, blankMask, copyMask, difference } from "./mask.js";

/** @typedef {import("./mask.js").Mask} Mask */
/** @typedef {{label: string, patch?: import("./mask.js").Patch, before?: Mask, after?: Mask}} Step */

const MOST_STEPS = 200;
const MOST_BYTES = 64 << 20;

/**
 * A mask with undo and redo. Events: "draw" after each change of pixels, also within a stroke; "commit" after each
 * finished step, undo and redo.
 */
export class MaskDocument extends EventTarget {
  /** @type {Step[]} */ #done = [];
  /** @type {Step[]} */ #undone = [];
  /** @type {Uint8Array<ArrayBuffer>} The pixels after the last finished step. */ #base;

  constructor() {
    super();
    /** @type {Mask} */
    this.mask = blankMask(1, 1);
    this.#base = this.mask.data.slice();
    /** Counts changes: equal numbers mean equal pixels. */
    this.version = 0;
  }

  get canUndo() {
    return this.#done.length > 0;
  }

  get canRedo() {
    return this.#undone.length > 0;
  }

  /** Pixels have been painted; the step is not finished. */
  touch() {
    this.version++;
    this.dispatchEvent(new Event("draw"));
  }

  /** Restores the pixels of the last finished step. */
  revert() {
    this.mask.data.set(this.#base);
    this.touch();
  }

  /** Restores these pixels without telling anyone, to draw the preview of a shape again. */
  rewind() {
    this.mask.data.set(this.#base);
  }

  /**
   * Finishes a step.
   * @param {string} label - what was done.
   * @returns {boolean} whether any pixel changed.
   */
  commit(label) {
    const patch = difference(this.mask, this.#base, this.mask.data);
    if (patch) this.#push({ label, patch });
    this.#settle();
    return patch !== null;
  }

  /**
   * Puts another mask into the place of this one, as one step.
   * @param {Mask} mask
   * @param {string} label
   * @param {{forget?: boolean}} [options] - forget: this is where the history starts.
   */
  replace(mask, label, { forget = false } = {}) {
    const step = { label, before: copyMask({ ...this.mask, data: this.#base }), after: copyMask(mask) };
    this.mask = copyMask(mask);
    if (forget) this.#done.length = this.#undone.length = 0;
    else this.#push(step);
    this.touch();
    this.#settle();
  }

  /** @returns {string | null} what was undone. */
  undo() {
    return this.#move(this.#done, this.#undone, "before");
  }

  /** @returns {string | null} what was done again. */
  redo() {
    return this.#move(this.#undone, this.#done, "after");
  }

  /** @param {Step} step */
  #push(step) {
    this.#done.push(step);
    this.#undone.length = 0;
    let bytes = 0;
    const sizes = this.#done.map((one) => 2 * (one.patch?.after ?? one.after?.data ?? []).length);
    let kept = 0;
    while (kept < Math.min(sizes.length, MOST_STEPS) && (bytes += sizes[sizes.length - 1 - kept]) <= MOST_BYTES) kept++;
    this.#done.splice(0, this.#done.length - Math.max(kept, 1));
  }

  /**
   * @param {Step[]} from
   * @param {Step[]} to
   * @param {"before" | "after"} side
   */
  #move(from, to, side) {
    const step = from.pop();
    if (!step) return null;
    to.push(step);
    this.rewind();
    if (step.patch) applyPatch(this.mask, step.patch, side);
    else this.mask = copyMask(/** @type {Mask} */ (step[side]));
    this.touch();
    this.#settle();
    return step.label;
  }

  /** The pixels as they are now are those of a finished step. */
  #settle() {
    this.#base = this.mask.data.slice();
    this.dispatchEvent(new Event("commit"));
  }
}
