/** The link that reproduces a picture: mask and settings in the fragment of the address. No DOM here. */

import { transformed } from "./png.js";

/** @typedef {import("./mask.js").Mask} Mask */

/**
 * @typedef {object} Picture
 * @property {Mask} mask
 * @property {number[]} seeds
 * @property {number} selected - position of the face that is shown large.
 * @property {"live" | "quality"} mode
 * @property {{live: number, quality: number}} steps
 * @property {number} guidance
 * @property {string} model - title and training step of the model.
 */

const VERSION = 1;
const MOST_PIXELS = 1 << 22;

/**
 * Returns run lengths: a byte for the class, and the length in groups of 7 bits, low groups first.
 * @param {Uint8Array<ArrayBuffer>} data
 */
export function encodeRuns(data) {
  const bytes = [];
  for (let i = 0; i < data.length; ) {
    let end = i + 1;
    while (end < data.length && data[end] === data[i]) end++;
    bytes.push(data[i]);
    for (let length = end - i; ; length >>>= 7) {
      bytes.push((length & 127) | (length > 127 ? 128 : 0));
      if (length <= 127) break;
    }
    i = end;
  }
  return Uint8Array.from(bytes);
}

/**
 * @param {Uint8Array<ArrayBuffer>} bytes
 * @param {number} length - of the result.
 * @throws {Error} the runs do not have this length together.
 */
export function decodeRuns(bytes, length) {
  const data = new Uint8Array(length);
  let at = 0;
  for (let i = 0; i < bytes.length; ) {
    const value = bytes[i++];
    let run = 0;
    for (let shift = 0; ; shift += 7) {
      if (i >= bytes.length || shift > 21) throw new Error("the link is damaged");
      run += (bytes[i] & 127) << shift;
      if (bytes[i++] < 128) break;
    }
    if (run === 0 || at + run > length) throw new Error("the link is damaged");
    data.fill(value, at, at + run);
    at += run;
  }
  if (at !== length) throw new Error("the link is damaged");
  return data;
}

/** @param {Uint8Array<ArrayBuffer>} bytes */
export function toBase64Url(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 4096) text += String.fromCharCode(...bytes.subarray(i, i + 4096));
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

/**
 * @param {string} text
 * @throws {Error} the text is not base64url.
 */
export function fromBase64Url(text) {
  if (!/^[\w-]*$/.test(text)) throw new Error("the link is damaged");
  return Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (letter) => letter.charCodeAt(0));
}

/**
 * Returns the fragment for a picture, without "#".
 * @param {Picture} picture
 * @returns {Promise<string>}
 */
export async function encodeLink({ mask, seeds, selected, mode, steps, guidance, model }) {
  const packed = await transformed(encodeRuns(mask.data), new CompressionStream("deflate-raw"));
  const fields = new URLSearchParams({
    v: String(VERSION),
    seeds: seeds.join("."),
    face: String(selected),
    mode,
    live: String(steps.live),
    quality: String(steps.quality),
    guidance: String(guidance),
    model,
    size: `${mask.width}x${mask.height}`,
    mask: toBase64Url(packed),
  });
  return fields.toString();
}

/**
 * Returns the picture of a fragment, or null if it has none.
 * @param {string} fragment - with or without "#".
 * @returns {Promise<Picture | null>}
 * @throws {Error} the fragment is damaged; the message says so.
 */
export async function decodeLink(fragment) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  if (!fields.has("mask")) return null;
  if (fields.get("v") !== String(VERSION)) throw new Error("the link was made by another version of this page");
  const [width, height] = (fields.get("size") ?? "").split("x").map(Number);
  if (!isWhole(width, 1, MOST_PIXELS) || !isWhole(height, 1, MOST_PIXELS) || width * height > MOST_PIXELS) {
    throw new Error("the link is damaged");
  }
  const seeds = (fields.get("seeds") ?? "").split(".").map(Number);
  const selected = Number(fields.get("face"));
  const mode = fields.get("mode") === "quality" ? "quality" : "live";
  const steps = { live: Number(fields.get("live")), quality: Number(fields.get("quality")) };
  const guidance = Number(fields.get("guidance"));
  const isValid =
    seeds.every((seed) => isWhole(seed, 0, 2 ** 32 - 1)) &&
    isWhole(selected, 0, seeds.length - 1) &&
    isWhole(steps.live, 1, 10_000) &&
    isWhole(steps.quality, 1, 10_000) &&
    Number.isFinite(guidance);
  if (!isValid) throw new Error("the link is damaged");
  let runs;
  try {
    const packed = fromBase64Url(fields.get("mask") ?? "");
    runs = await transformed(packed, new DecompressionStream("deflate-raw"), 2 * width * height + 16);
  } catch {
    throw new Error("the link is damaged; perhaps it was cut off");
  }
  const mask = { width, height, data: decodeRuns(runs, width * height) };
  return { mask, seeds, selected, mode, steps, guidance, model: fields.get("model") ?? "" };
}

/**
 * @param {number} value
 * @param {number} low
 * @param {number} high
 */
function isWhole(value, low, high) {
  return Number.isInteger(value) && value >= low && value <= high;
}
