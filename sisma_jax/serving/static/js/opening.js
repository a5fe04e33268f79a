/** Masks and photographs that people open. */

import { hasOnlyClasses } from "./classes.js";
import { centralSquare, fitted, resizeMask } from "./mask.js";
import { readMaskFile } from "./mask_file.js";
import { PREVIEW_SIDE } from "./state.js";

/** @typedef {import("./classes.js").Model} Model */
/** @typedef {import("./mask.js").Mask} Mask */
/** @typedef {import("./state.js").Photo} Photo */
/** @typedef {import("./api.js").Client} Client */

/** Masks are painted at this size at least; the server resizes them to the model's resolution. */
const LEAST_SIDE = 256;

/** @param {Model} model */
export function boardSide({ resolution }) {
  return Math.max(LEAST_SIDE, resolution);
}

/**
 * Returns a mask at the size of the board; of one that is not square, the central square.
 * @param {Mask} mask
 * @param {Model} model
 */
export function onBoard(mask, model) {
  const square = centralSquare(mask);
  const side = boardSide(model);
  return square.width === side ? square : resizeMask(square, side, side);
}

/**
 * Returns the mask of a PNG file.
 * @param {Blob} file
 * @param {Model} model
 * @throws {Error} the file is no mask of the model's classes.
 */
export async function openMask(file, model) {
  requireSize(file, model);
  try {
    return onBoard(await readMaskFile(new Uint8Array(await file.arrayBuffer()), model), model);
  } catch (error) {
    throw new Error(`This is no mask: ${error instanceof Error ? error.message : error}`);
  }
}

/**
 * Returns the mask of the largest face of a photograph.
 * @param {Blob} file
 * @param {Model} model
 * @param {Client} client
 */
export async function openMaskOfPhoto(file, model, client) {
  requireSize(file, model);
  return onBoard(await segmented(file, model, client, false), model);
}

/**
 * Returns a photograph to edit, with its mask.
 * @param {File} file
 * @param {Model} model
 * @param {Client} client
 * @returns {Promise<Photo>}
 */
export async function openPhoto(file, model, client) {
  requireSize(file, model);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error("This is no photograph that the browser can read; PNG, JPEG and WebP files are.");
  }
  const longest = Math.min(PREVIEW_SIDE, Math.max(bitmap.width, bitmap.height));
  const [width, height] = fitted(bitmap.width, bitmap.height, longest);
  const canvas = new OffscreenCanvas(width, height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const preview = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
  const mask = await segmented(preview, model, client, true);
  const before = mask.width === width && mask.height === height ? mask : resizeMask(mask, width, height);
  return { name: file.name, original: file, preview, bitmap: await createImageBitmap(preview), before };
}

/**
 * @param {Blob} photo
 * @param {Model} model
 * @param {Client} client
 * @param {boolean} whole
 */
async function segmented(photo, model, client, whole) {
  const mask = await readMaskFile(await client.segment(photo, { whole }), model);
  if (!hasOnlyClasses(mask, model)) throw new Error("The server's mask has other classes.");
  return mask;
}

/**
 * @param {Blob} file
 * @param {Model} model
 */
function requireSize(file, { limits }) {
  const most = Math.floor(limits.body_bytes / 2 ** 20);
  if (file.size > limits.body_bytes) throw new Error(`The file is larger than ${most} MiB, the limit of the server.`);
}
