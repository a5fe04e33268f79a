/** The keys of the page, in one table: they are handled by it, and the dialog lists it. */

import { takesText } from "./dom.js";

/**
 * @typedef {object} Shortcut
 * @property {string} keys - as the dialog shows them.
 * @property {string} about
 * @property {(event: KeyboardEvent) => boolean} matches
 * @property {() => void} run
 * @property {boolean} [isChord] - with a modifier, so that it works while single keys are off.
 */

/**
 * @param {string} key
 * @returns {(event: KeyboardEvent) => boolean}
 */
const single = (key) => (event) => !event.ctrlKey && !event.metaKey && !event.altKey && event.key.toLowerCase() === key;

/**
 * @param {string} key
 * @param {boolean} isShifted
 * @returns {(event: KeyboardEvent) => boolean}
 */
const chord = (key, isShifted) => (event) =>
  (event.ctrlKey || event.metaKey) && !event.altKey && event.shiftKey === isShifted && event.key.toLowerCase() === key;

/**
 * @param {Record<string, () => void>} actions - by name.
 * @returns {Shortcut[]}
 */
export function shortcutsFor(actions) {
  const tools = { b: "brush", f: "fill", l: "line", o: "ellipse", e: "eraser", i: "eyedropper" };
  const redo = [chord("z", true), chord("y", false)];
  return [
    ...Object.entries(tools).map(([key, tool]) => ({
      keys: key.toUpperCase(),
      about: tool.charAt(0).toUpperCase() + tool.slice(1),
      matches: single(key),
      run: actions[tool],
    })),
    { keys: "[", about: "Thinner brush", matches: single("["), run: actions.thinner },
    { keys: "]", about: "Thicker brush", matches: single("]"), run: actions.thicker },
    { keys: ",", about: "Previous class", matches: single(","), run: actions.previousClass },
    { keys: ".", about: "Next class", matches: single("."), run: actions.nextClass },
    { keys: "M", about: "Mirrored drawing", matches: single("m"), run: actions.mirror },
    { keys: "+", about: "Zoom in", matches: (e) => single("+")(e) || single("=")(e), run: actions.zoomIn },
    { keys: "−", about: "Zoom out", matches: single("-"), run: actions.zoomOut },
    { keys: "0", about: "Whole mask", matches: single("0"), run: actions.zoomFit },
    { keys: "N", about: "New person", matches: single("n"), run: actions.newPerson },
    { keys: "K", about: "Keep this person", matches: single("k"), run: actions.keep },
    { keys: "Q", about: "Live or quality", matches: single("q"), run: actions.toggleMode },
    { keys: "Ctrl Z", about: "Undo", matches: chord("z", false), run: actions.undo, isChord: true },
    {
      keys: "Ctrl Shift Z",
      about: "Redo",
      matches: (/** @type {KeyboardEvent} */ event) => redo.some((matches) => matches(event)),
      run: actions.redo,
      isChord: true,
    },
    { keys: "?", about: "This list", matches: single("?"), run: actions.help },
  ];
}

/**
 * Runs shortcuts, unless text is typed or a dialog is open.
 * @param {Shortcut[]} shortcuts
 * @param {() => boolean} hasSingleKeys - whether keys without a modifier count.
 */
export function listenForShortcuts(shortcuts, hasSingleKeys) {
  document.addEventListener("keydown", (event) => {
    if (takesText(event.target) || event.defaultPrevented || document.querySelector("dialog[open]")) return;
    const found = shortcuts.find((one) => one.matches(event) && (one.isChord || hasSingleKeys()));
    if (!found) return;
    event.preventDefault();
    found.run();
  });
}
