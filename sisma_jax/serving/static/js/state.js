/** What the page knows, apart from the mask. */

/** @typedef {import("./classes.js").Model} Model */
/** @typedef {import("./tools.js").Tool} Tool */

/**
 * @typedef {object} Photo - a photograph that is edited.
 * @property {string} name - of its file.
 * @property {Blob} original
 * @property {Blob} preview - at most `PREVIEW_SIDE` pixels, for edits while painting.
 * @property {ImageBitmap} bitmap - of the preview.
 * @property {import("./mask.js").Mask} before - its mask before it was changed.
 */

/**
 * @typedef {object} State
 * @property {Model | null} model
 * @property {Tool} tool
 * @property {number} value - class index to paint.
 * @property {number} size - width of the brush, in pixels of the mask.
 * @property {boolean} isMirrored
 * @property {"live" | "quality"} mode
 * @property {{live: number, quality: number}} steps - per mode.
 * @property {boolean} areStepsChosen - whether a person or a link chose the steps of the live mode.
 * @property {number} guidance
 * @property {number[]} seeds - one face per seed.
 * @property {number} selected - position of the face that is shown large.
 * @property {boolean} isKept - whether the person stays while the mask changes.
 * @property {Photo | null} photo
 * @property {import("./api.js").Faces | null} faces - that are shown, finished.
 * @property {import("./repainting.js").Phase} phase
 */

export const PREVIEW_SIDE = 512;
export const MOST_VARIATIONS = 8;

/** @type {State} */
export const INITIAL = {
  model: null,
  tool: "brush",
  value: 0,
  size: 13,
  isMirrored: false,
  mode: "live",
  steps: { live: 1, quality: 1 },
  areStepsChosen: false,
  guidance: 1,
  seeds: [0],
  selected: 0,
  isKept: true,
  photo: null,
  faces: null,
  phase: "idle",
};

/** @returns {number} a random seed. */
export function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

/**
 * Returns as many seeds as wanted. The selected one stays, and the others as far as there are enough.
 * @param {number[]} seeds
 * @param {number} selected
 * @param {number} count
 * @returns {{seeds: number[], selected: number}}
 */
export function withCount(seeds, selected, count) {
  if (count >= seeds.length) {
    return { seeds: [...seeds, ...Array.from({ length: count - seeds.length }, randomSeed)], selected };
  }
  const kept = seeds.slice(0, count);
  if (selected < count) return { seeds: kept, selected };
  kept[count - 1] = seeds[selected];
  return { seeds: kept, selected: count - 1 };
}

/**
 * Returns the number of steps that follow a stroke without delay, from a measured time.
 * @param {number} stepMs - time of one step.
 * @param {number} most - steps with which the model is meant to be used.
 */
export function liveSteps(stepMs, most) {
  const budgetMs = 100;
  return Math.max(1, Math.min(most, Math.floor(budgetMs / stepMs)));
}
