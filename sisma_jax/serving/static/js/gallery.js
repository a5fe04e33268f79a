/** Example masks: label maps of drawn faces, in files beside the page. */

import { colorize } from "./mask.js";
import { colorWords, converted } from "./classes.js";
import { byId, element } from "./dom.js";
import { readMaskFile } from "./mask_file.js";

/** @typedef {import("./mask.js").Mask} Mask */
/** @typedef {import("./classes.js").Model} Model */
/** @typedef {{name: string, mask: Mask}} Example */

const FOLDER = "/static/examples/";

/**
 * Returns the examples in the classes of the model; those that need other classes are left out.
 * @param {Model} model
 * @returns {Promise<Example[]>}
 */
export async function loadExamples(model) {
  const { names, examples } = await (await fetch(`${FOLDER}examples.json`)).json();
  const own = { ...model, names, colors: [] };
  const loaded = await Promise.all(
    examples.map(async (/** @type {{file: string, name: string}} */ { file, name }) => {
      const content = await (await fetch(FOLDER + file)).arrayBuffer();
      const mask = converted(await readMaskFile(new Uint8Array(content), own), names, model.names);
      return mask && { name, mask };
    }),
  );
  return loaded.filter(Boolean);
}

/**
 * Shows the examples as buttons.
 * @param {Example[]} examples
 * @param {Model} model
 * @param {(example: Example) => void} choose
 */
export function showExamples(examples, model, choose) {
  const colors = colorWords(model.colors);
  byId("gallery").replaceChildren(
    ...examples.map((example) => {
      const button = element("button", { type: "button", className: "thumb", "aria-label": example.name });
      button.title = example.name;
      button.append(thumbnail(example.mask, colors));
      button.addEventListener("click", () => choose(example));
      return element("li", {}, button);
    }),
  );
  byId("examples").hidden = !examples.length;
}

/**
 * @param {Mask} mask
 * @param {Uint32Array} colors
 */
function thumbnail(mask, colors) {
  const canvas = element("canvas", { width: mask.width, height: mask.height, className: "hard" });
  const image = new ImageData(mask.width, mask.height);
  colorize(mask, colors, image.data);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
