/** Files of masks to class indices: label maps, palette images, and images in the colours of the classes. No DOM here. */

import { decodePng } from "./png.js";

/** @typedef {import("./mask.js").Mask} Mask */
/** @typedef {import("./png.js").Raster} Raster */
/** @typedef {import("./classes.js").Color} Color */

/**
 * Reads a PNG file of a mask.
 * @param {Uint8Array<ArrayBuffer>} file
 * @param {Pick<import("./classes.js").Model, "names" | "colors" | "limits" | "title">} model
 * @returns {Promise<Mask>}
 * @throws {Error} the file cannot be read, or is no mask of these classes; the message says why.
 */
export async function readMaskFile(file, model) {
  const raster = await decodePng(file, model.limits.mask_pixels);
  const mask = byPalette(raster, model.colors) ?? byIndex(raster, model.names.length) ?? byColor(raster, model.colors);
  if (!mask) {
    throw new Error(
      `the image has neither class indices below ${model.names.length} nor only the colours of ${model.title}; ` +
        "a photograph is loaded with the other button",
    );
  }
  return mask;
}

/**
 * @param {Raster} raster
 * @param {(pixel: number) => number | undefined} labelOf - class index of a pixel, or undefined.
 * @returns {Mask | null}
 */
function labelled({ width, height }, labelOf) {
  const data = new Uint8Array(width * height);
  for (let i = 0; i < data.length; i++) {
    const label = labelOf(i);
    if (label === undefined) return null;
    data[i] = label;
  }
  return { width, height, data };
}

/** @param {Color[]} colors */
function tableOf(colors) {
  return new Map(colors.map(([red, green, blue], index) => [(red << 16) | (green << 8) | blue, index]));
}

/**
 * @param {Raster} raster
 * @param {Color[]} colors
 */
function byPalette(raster, colors) {
  if (!raster.palette || raster.channels !== 1) return null;
  const table = tableOf(colors);
  const labels = raster.palette.map(([red, green, blue]) => table.get((red << 16) | (green << 8) | blue));
  return labelled(raster, (i) => labels[raster.samples[i]]);
}

/**
 * Grey values are indices, also when three channels repeat them.
 * @param {Raster} raster
 * @param {number} count
 */
function byIndex({ channels, samples, ...raster }, count) {
  return labelled({ ...raster, channels, samples }, (i) => {
    const value = samples[i * channels];
    const isGrey = channels < 3 || (samples[i * channels + 1] === value && samples[i * channels + 2] === value);
    return isGrey && value < count ? value : undefined;
  });
}

/**
 * @param {Raster} raster
 * @param {Color[]} colors
 */
function byColor({ channels, samples, ...raster }, colors) {
  if (channels < 3 || samples instanceof Uint16Array) return null;
  const table = tableOf(colors);
  return labelled({ ...raster, channels, samples }, (i) => {
    const [red, green, blue] = samples.subarray(i * channels, i * channels + 3);
    return table.get((red << 16) | (green << 8) | blue);
  });
}
