/** What the keys of the page do. */

import { readableName } from "./classes.js";
import { newPerson } from "./controls.js";
import { fillShortcuts, showShortcuts } from "./dialogs.js";
import { byId } from "./dom.js";
import { announce } from "./messages.js";
import { listenForShortcuts, shortcutsFor } from "./shortcuts.js";
import { TOOLS } from "./tools.js";

/**
 * Makes the keys work. Each says what it has done, since its button may be out of sight.
 * @param {import("./store.js").Store<import("./state.js").State>} store
 * @param {import("./board.js").Board} board
 * @param {(direction: "undo" | "redo") => void} moveInHistory
 */
export function wireShortcuts(store, board, moveInHistory) {
  /** @param {number} by */
  const nextClass = (by) => () => {
    const { model, value } = store.get();
    if (!model) return;
    const next = (value + by + model.names.length) % model.names.length;
    store.set({ value: next });
    announce(readableName(model.names[next]));
  };
  /** @param {1 | -1} direction */
  const resize = (direction) => () => {
    const { min, max } = /** @type {HTMLInputElement} */ (byId("size"));
    const { size } = store.get();
    const by = 2 * Math.max(1, Math.round(size / 10)); // widths stay odd
    store.set({ size: Math.max(Number(min), Math.min(Number(max), size + direction * by)) });
    announce(`Brush ${store.get().size} pixels`);
  };
  const tools = TOOLS.map((tool) => [
    tool,
    () => {
      store.set({ tool });
      announce(tool);
    },
  ]);
  const shortcuts = shortcutsFor({
    ...Object.fromEntries(tools),
    thinner: resize(-1),
    thicker: resize(1),
    previousClass: nextClass(-1),
    nextClass: nextClass(1),
    mirror() {
      store.set({ isMirrored: !store.get().isMirrored });
      announce(`Mirrored drawing ${store.get().isMirrored ? "on" : "off"}`);
    },
    zoomIn: () => board.zoomIn(),
    zoomOut: () => board.zoomOut(),
    zoomFit: () => board.zoomTo(1),
    newPerson() {
      newPerson(store);
      announce("New person");
    },
    keep() {
      store.set({ isKept: !store.get().isKept });
      announce(store.get().isKept ? "The person is kept" : "A new person after each stroke");
    },
    toggleMode() {
      store.set({ mode: store.get().mode === "live" ? "quality" : "live" });
      announce(`${store.get().mode} mode`);
    },
    undo: () => moveInHistory("undo"),
    redo: () => moveInHistory("redo"),
    help: showShortcuts,
  });
  fillShortcuts(shortcuts);
  listenForShortcuts(shortcuts, () => /** @type {HTMLInputElement} */ (byId("single-keys")).checked);
}
