/** The palette: one radio button per class, with its colour and name. */

import { readableName } from "./classes.js";
import { byId, element } from "./dom.js";

/**
 * @param {import("./store.js").Store<import("./state.js").State>} store
 */
export function wirePalette(store) {
  const list = byId("palette");
  list.addEventListener("change", (event) => {
    store.set({ value: Number(/** @type {HTMLInputElement} */ (event.target).value) });
  });
  store.watch(["model"], ({ model }) => {
    if (model) list.replaceChildren(...model.names.map((name, index) => swatch(name, model.colors[index], index)));
  });
  store.watch(["value", "model"], ({ value, model }) => {
    const button = list.querySelector(`input[value="${value}"]`);
    if (!model || !(button instanceof HTMLInputElement)) return;
    button.checked = true;
    const item = /** @type {HTMLElement} */ (button.parentElement);
    list.scrollLeft = item.offsetLeft - (list.clientWidth - item.offsetWidth) / 2; // on phones it is a row
    byId("current-class").textContent = readableName(model.names[value]);
  });
}

/**
 * @param {string} name
 * @param {import("./classes.js").Color} color
 * @param {number} index
 */
function swatch(name, color, index) {
  const chip = element("span", { className: "chip", "aria-hidden": "true" });
  chip.style.backgroundColor = `rgb(${color.join(" ")})`;
  const input = element("input", { type: "radio", name: "class", value: String(index) });
  return element("label", { className: "swatch", title: name }, input, chip, element("span", {}, readableName(name)));
}
