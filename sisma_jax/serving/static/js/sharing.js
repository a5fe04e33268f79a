/** What people take away: image, mask, settings and a link. */

import { byId, save } from "./dom.js";
import { encodeLink } from "./link.js";
import { announce, hideError, sentence, showError } from "./messages.js";
import { encodeMask } from "./png.js";

/** @typedef {import("./store.js").Store<import("./state.js").State>} Store */
/** @typedef {import("./history.js").MaskDocument} MaskDocument */

const LINK_DELAY_MS = 400;

/**
 * Returns the name of the model in a link.
 * @param {import("./classes.js").Model} model
 */
export function modelName({ title, step }) {
  return `${title} ${step}`;
}

/**
 * Returns the address that reproduces the picture.
 * @param {Store} store
 * @param {MaskDocument} mask
 */
async function currentLink(store, { mask }) {
  const { seeds, selected, mode, steps, guidance, model } = store.get();
  if (!model) throw new Error("The model is not loaded yet.");
  const fragment = await encodeLink({ mask, seeds, selected, mode, steps, guidance, model: modelName(model) });
  return `${location.origin}${location.pathname}#${fragment}`;
}

/**
 * Makes the buttons work, and keeps the address up to date.
 * @param {Store} store
 * @param {MaskDocument} mask
 */
export function wireSharing(store, mask) {
  let timer = 0;
  const remember = () => {
    clearTimeout(timer);
    if (!store.get().model || store.get().photo) return;
    timer = setTimeout(async () => history.replaceState(null, "", await currentLink(store, mask)), LINK_DELAY_MS);
  };
  mask.addEventListener("commit", remember);
  store.watch(["seeds", "selected", "mode", "steps", "guidance", "photo"], remember);

  const wired = {
    "copy-link": () => copyLink(store, mask),
    "save-image": () => saveImage(store),
    "save-mask": async () => save(new Blob([await encodeMask(mask.mask)], { type: "image/png" }), "mask.png"),
    "save-settings": () => saveSettings(store),
  };
  for (const [id, act] of Object.entries(wired)) {
    byId(id).addEventListener("click", async () => {
      try {
        await act();
      } catch (error) {
        showError(sentence(error));
      }
    });
  }
  store.watch(["faces", "photo"], ({ faces, photo }) => {
    /** @type {HTMLButtonElement} */ (byId("save-image")).disabled = !faces;
    /** @type {HTMLButtonElement} */ (byId("copy-link")).disabled = photo !== null;
  });
}

/**
 * @param {Store} store
 * @param {MaskDocument} mask
 */
async function copyLink(store, mask) {
  const link = await currentLink(store, mask);
  history.replaceState(null, "", link);
  try {
    await navigator.clipboard.writeText(link);
    hideError();
    flash(byId("copy-link"), "Link copied");
  } catch {
    showError("The browser does not allow copying; the link is in the address bar.");
  }
}

/**
 * Shows on a button that it has worked.
 * @param {HTMLElement} button
 * @param {string} text
 */
function flash(button, text) {
  announce(text);
  button.dataset.done = "true";
  setTimeout(() => delete button.dataset.done, 1500);
}

/** @param {Store} store */
function saveImage(store) {
  const { faces, selected, photo } = store.get();
  if (!faces) return;
  const stem = photo ? photo.name.replace(/\.\w+$/, "") : "face";
  save(faces.images[selected], `${stem}_${faces.seeds[selected]}.png`);
}

/** @param {Store} store */
function saveSettings(store) {
  const { faces, model, seeds, steps, mode, guidance } = store.get();
  const settings = faces?.settings ?? { steps: steps[mode], guidance };
  const content = { model: model && modelName(model), seeds, ...settings };
  save(new Blob([`${JSON.stringify(content, null, 2)}\n`], { type: "application/json" }), "settings.json");
}
