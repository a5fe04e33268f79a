/** The classes of the model: names, colours, sides. No DOM here. */

/** @typedef {import("./mask.js").Mask} Mask */
/** @typedef {[number, number, number]} Color */

/**
 * @typedef {object} Limits
 * @property {[number, number]} num_samples
 * @property {[number, number]} seed
 * @property {[number, number]} steps
 * @property {[number, number]} guidance
 * @property {number} stream_images
 * @property {number} body_bytes
 * @property {number} mask_pixels
 * @property {number} photo_pixels
 */

/**
 * @typedef {object} Model - the answer of /v1/classes.
 * @property {string} title
 * @property {string[]} names - the position is the class index.
 * @property {Color[]} colors
 * @property {[string, string][]} mirrored - left and right of the subject.
 * @property {number | null} ignored
 * @property {number} resolution
 * @property {boolean} segment - whether there is a face parser.
 * @property {number} step
 * @property {{steps: number, seed: number, guidance: number, [name: string]: unknown}} defaults
 * @property {Limits} limits
 */

/** What abbreviations mean in CelebAMask-HQ. */
const WORDS = /** @type {Record<string, string>} */ ({
  eye_g: "glasses",
  ear_r: "earring",
  neck_l: "necklace",
  u_lip: "upper lip",
  l_lip: "lower lip",
  cloth: "clothes",
});

/**
 * Returns the name of a class as people read it: "l_eye" is "Left eye".
 * @param {string} name
 */
export function readableName(name) {
  const words = WORDS[name] ?? name.replace(/^l_/, "left ").replace(/^r_/, "right ").replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

/**
 * Returns the class index on the other side for each class index.
 * @param {Pick<Model, "names" | "mirrored">} model
 * @returns {number[]}
 */
export function otherSides({ names, mirrored }) {
  const others = names.map((_, index) => index);
  for (const [left, right] of mirrored) {
    const [a, b] = [names.indexOf(left), names.indexOf(right)];
    if (a < 0 || b < 0) continue;
    others[a] = b;
    others[b] = a;
  }
  return others;
}

/**
 * Returns the colours as 32-bit words of RGBA samples in memory. Indices that are no class are transparent.
 * @param {Color[]} colors
 * @returns {Uint32Array}
 */
export function colorWords(colors) {
  const bytes = new Uint8Array(4 * 256);
  colors.forEach((color, index) => bytes.set([...color, 255], 4 * index));
  return new Uint32Array(bytes.buffer);
}

/**
 * Returns the index of the class that the eraser paints: the background, else the first.
 * @param {string[]} names
 */
export function backgroundOf(names) {
  return Math.max(0, names.indexOf("background"));
}

/**
 * Returns a mask of one class set in the indices of another, or null if a class of the mask is absent there.
 * @param {Mask} mask
 * @param {string[]} from - names of the classes of the mask.
 * @param {string[]} to
 * @returns {Mask | null}
 */
export function converted(mask, from, to) {
  const table = new Uint8Array(256).fill(255);
  from.forEach((name, index) => {
    if (to.includes(name)) table[index] = to.indexOf(name);
  });
  const data = mask.data.map((value) => table[value]);
  return data.includes(255) ? null : { ...mask, data };
}

/**
 * Returns whether each pixel has a class of the model.
 * @param {Mask} mask
 * @param {Pick<Model, "names">} model
 */
export function hasOnlyClasses(mask, { names }) {
  return mask.data.every((value) => value < names.length);
}
