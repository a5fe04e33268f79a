/** The dialogs: shortcuts, and the API key. */

import { byId, element } from "./dom.js";

/** @param {import("./shortcuts.js").Shortcut[]} shortcuts */
export function fillShortcuts(shortcuts) {
  byId("shortcut-list").replaceChildren(
    ...shortcuts.map(({ keys, about }) =>
      element(
        "div",
        {},
        element("dt", {}, ...keys.split(" ").map((key) => element("kbd", {}, key))),
        element("dd", {}, about),
      ),
    ),
  );
}

/** Shows the shortcuts. */
export function showShortcuts() {
  /** @type {HTMLDialogElement} */ (byId("shortcuts")).showModal();
}

/** @type {Promise<string | null> | null} */
let answer = null;

/**
 * Asks for the API key; once for all who ask while the dialog is open.
 * @param {string} reason - what the server said.
 * @returns {Promise<string | null>} null if the dialog is closed without a key.
 */
export function askForKey(reason) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("key-dialog"));
  const input = /** @type {HTMLInputElement} */ (byId("key"));
  answer ??= new Promise((resolve) => {
    byId("key-reason").textContent = reason;
    input.value = "";
    dialog.returnValue = "";
    dialog.showModal();
    const finish = () => {
      answer = null;
      resolve(dialog.returnValue === "use" && input.value.trim() ? input.value.trim() : null);
    };
    dialog.addEventListener("close", finish, { once: true });
  });
  return answer;
}

/** Makes the buttons of the dialogs work; forms cannot be submitted under the content security policy. */
export function wireDialogs() {
  byId("help").addEventListener("click", showShortcuts);
  document.querySelectorAll("dialog").forEach((dialog) => {
    dialog.addEventListener("click", (event) => {
      const button = event.target instanceof Element ? event.target.closest("button[value]") : null;
      if (button instanceof HTMLButtonElement) dialog.close(button.value);
      else if (event.target === dialog) dialog.close("");
    });
  });
  byId("key").addEventListener("keydown", (event) => {
    if (event.key === "Enter") /** @type {HTMLDialogElement} */ (byId("key-dialog")).close("use");
  });
}
