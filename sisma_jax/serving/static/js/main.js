/** The page: makes the parts and joins them. docs/painting_page.md describes what it does. */

import { wireShortcuts } from "./actions.js";
import { ApiError, Client } from "./api.js";
import { Board } from "./board.js";
import { backgroundOf, colorWords, otherSides, readableName } from "./classes.js";
import { newPerson, wireSettings, wireTools } from "./controls.js";
import { askForKey, wireDialogs } from "./dialogs.js";
import { byId } from "./dom.js";
import { FaceView } from "./faces.js";
import { Starter } from "./files.js";
import { loadExamples, showExamples } from "./gallery.js";
import { MaskDocument } from "./history.js";
import { decodeLink } from "./link.js";
import { blankMask } from "./mask.js";
import { announce, hideError, sentence, showError, showPhase, wireMessages } from "./messages.js";
import { onBoard } from "./opening.js";
import { wirePalette } from "./palette.js";
import { calibrate, currentJob } from "./picture.js";
import { Repainter } from "./repainting.js";
import { modelName, wireSharing } from "./sharing.js";
import { INITIAL } from "./state.js";
import { createStore } from "./store.js";

const LEAST_LIVE_STEPS = 4;
const CURSOR_DELAY_MS = 250;

const store = createStore(INITIAL);
const mask = new MaskDocument();
const client = new Client();
const view = new FaceView(store);

const repainter = new Repainter(
  () => currentJob({ store, mask, client, view, onProgress: showProgress, onDone: showDone }),
  showRequest,
  () => client.isReady(),
);

const board = new Board({
  mask,
  elements: {
    frame: byId("board"),
    view: byId("board-view"),
    paper: byId("board-paper"),
    canvas: byId("mask"),
    overlay: byId("board-overlay"),
  },
  brush() {
    const { model, tool, value, size, isMirrored } = store.get();
    const names = model?.names ?? [];
    const sides = otherSides({ names, mirrored: model?.mirrored ?? [] });
    return { tool, value, size, isMirrored, background: backgroundOf(names), otherSides: sides };
  },
  pick: (value) => store.set({ value }),
  onStroke: () => {
    if (!store.get().isKept) newPerson(store);
  },
  onCursor: describeCursor,
  onZoom: (zoom) => {
    byId("zoom-value").textContent = `${Math.round(zoom * 100)} %`;
  },
});

const starter = new Starter({ store, mask, client, board, unlock });

/** Asks for the face of the current state, once for all changes of one task. */
const requestSoon = (() => {
  let isPlanned = false;
  return () => {
    if (isPlanned) return;
    isPlanned = true;
    queueMicrotask(() => {
      isPlanned = false;
      if (!board.isStroking) repainter.request();
    });
  };
})();

/**
 * @param {number} step
 * @param {number} steps
 */
function showProgress(step, steps) {
  const bar = /** @type {HTMLProgressElement} */ (byId("progress"));
  bar.hidden = !steps;
  bar.max = Math.max(1, steps);
  bar.value = step;
}

/** @param {number} milliseconds */
function showDone(milliseconds) {
  const { faces, mode, photo } = store.get();
  hideError({ onlyTransient: true });
  showProgress(0, 0);
  byId("time").textContent = milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
  byId("face").setAttribute("aria-label", photo ? `Edited photograph ${photo.name}` : "Face for the mask");
  if (mode === "quality") announce("The face is finished.");
  if (faces) calibrate(store, faces);
}

/**
 * @param {import("./repainting.js").Phase} phase
 * @param {import("./api.js").ApiError | null} error
 * @param {number} waitSecs
 */
function showRequest(phase, error, waitSecs) {
  store.set({ phase });
  showPhase(phase);
  if (!error) return;
  showProgress(0, 0);
  const retry = () => repainter.request({ force: true });
  if (phase === "locked") return void unlock(error, retry);
  const text = sentence(error);
  if (phase === "offline") {
    showError("The server cannot be reached. The page continues by itself when it is back.", { retry, isTransient: true });
  } else if (phase === "again") {
    showError(`${text} The page tries again in ${Math.ceil(waitSecs)} s.`, { retry, isTransient: true });
  } else {
    showError(text, { retry, isTransient: true });
  }
}

/**
 * Asks for the API key, and continues with it.
 * @param {Error} reason
 * @param {() => void} proceed
 */
async function unlock(reason, proceed) {
  const key = await askForKey(sentence(reason));
  if (key) {
    client.key = key;
    hideError();
    proceed();
  } else {
    showError("Without an API key the server does not answer.", { retry: () => unlock(reason, proceed) });
  }
}

/** Says where the cursor of the keyboard is, when it rests. */
const cursorTimer = { id: 0 };

/**
 * @param {import("./tools.js").Point} point
 * @param {number | null} value
 */
function describeCursor([x, y], value) {
  const { model } = store.get();
  clearTimeout(cursorTimer.id);
  if (!model || value === null) return;
  cursorTimer.id = setTimeout(
    () => announce(`${readableName(model.names[value])}, column ${x + 1}, row ${y + 1}`),
    CURSOR_DELAY_MS,
  );
}

/** @param {"undo" | "redo"} direction */
function moveInHistory(direction) {
  board.abandon();
  const label = mask[direction]();
  if (label) announce(`${direction === "undo" ? "Undone" : "Done again"}: ${label}.`);
}

/** Shows the photograph that is edited while nothing of its mask is changed. */
function showOriginal() {
  const { photo, seeds } = store.get();
  if (!photo || currentJob({ store, mask, client, view, onProgress: showProgress, onDone: showDone })) return;
  store.set({ faces: null });
  view.showBitmaps(seeds.map(() => photo.bitmap));
  byId("face").setAttribute("aria-label", `Photograph ${photo.name}`);
  byId("time").textContent = "";
}

function wirePhoto() {
  const backdrop = /** @type {HTMLCanvasElement} */ (byId("photo"));
  const veil = /** @type {HTMLInputElement} */ (byId("veil"));
  const showVeil = () => {
    byId("mask").style.opacity = store.get().photo ? `${Number(veil.value) / 100}` : "1";
    byId("veil-value").textContent = `${veil.value} %`;
  };
  veil.addEventListener("input", showVeil);
  store.watch(["photo"], ({ photo }) => {
    document.body.dataset.task = photo ? "edit" : "face";
    byId("photo-bar").hidden = byId("veil-field").hidden = !photo;
    if (photo) {
      byId("photo-name").textContent = photo.name;
      [backdrop.width, backdrop.height] = [photo.bitmap.width, photo.bitmap.height];
      backdrop.getContext("2d")?.drawImage(photo.bitmap, 0, 0);
    }
    showVeil();
  });
  mask.addEventListener("commit", showOriginal);
}

function wireHistory() {
  const [undo, redo] = [byId("undo"), byId("redo")].map((button) => /** @type {HTMLButtonElement} */ (button));
  undo.addEventListener("click", () => moveInHistory("undo"));
  redo.addEventListener("click", () => moveInHistory("redo"));
  mask.addEventListener("commit", () => {
    // A button that loses the focus by being disabled would send the keyboard to the top of the page.
    undo.setAttribute("aria-disabled", String(!mask.canUndo));
    redo.setAttribute("aria-disabled", String(!mask.canRedo));
  });
  byId("zoom-in").addEventListener("click", () => board.zoomIn());
  byId("zoom-out").addEventListener("click", () => board.zoomOut());
  byId("zoom-fit").addEventListener("click", () => board.zoomTo(1));
}

function wireMenus() {
  const menu = /** @type {HTMLDetailsElement} */ (byId("downloads"));
  document.addEventListener("click", (event) => {
    const isInside = event.target instanceof Node && menu.contains(event.target);
    if (!isInside || (event.target instanceof Element && event.target.closest("button"))) menu.open = false;
  });
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !menu.open) return;
    menu.open = false;
    menu.querySelector("summary")?.focus();
  });
}

/**
 * Puts the picture of a link into the state.
 * @param {import("./link.js").Picture} picture
 * @param {import("./classes.js").Model} model
 */
function openPicture(picture, model) {
  if (!picture.mask.data.every((value) => value < model.names.length)) {
    throw new Error("The mask of the link has classes that this model does not have.");
  }
  const most = model.limits.steps[1];
  const [low, high] = model.limits.guidance;
  store.set({
    seeds: picture.seeds.slice(0, model.limits.num_samples[1]),
    selected: Math.min(picture.selected, model.limits.num_samples[1] - 1),
    mode: picture.mode,
    steps: { live: Math.min(picture.steps.live, most), quality: Math.min(picture.steps.quality, most) },
    areStepsChosen: true,
    guidance: Math.min(high, Math.max(low, picture.guidance)),
  });
  starter.begin(onBoard(picture.mask, model), "link", { forget: true });
  if (picture.model && picture.model !== modelName(model)) {
    showError(`The link was made with another model (${picture.model}); the face may differ.`);
  }
}

/** @returns {Promise<boolean>} whether the address has a picture. */
async function openLink() {
  try {
    const picture = await decodeLink(location.hash);
    if (picture) openPicture(picture, starter.model);
    return picture !== null;
  } catch (error) {
    showError(`The link cannot be opened: ${sentence(error)}`);
    return false;
  }
}

/** @param {import("./classes.js").Model} model */
async function begin(model) {
  const { steps, seed, guidance } = model.defaults;
  const skin = model.names.indexOf("skin");
  store.set({
    model,
    value: Math.max(model.names.indexOf("hair"), skin, model.names.length > 1 ? 1 : 0),
    steps: { live: Math.min(LEAST_LIVE_STEPS, steps), quality: steps },
    seeds: [seed],
    guidance,
  });
  board.colors = colorWords(model.colors);
  byId("model-title").textContent = model.title;
  for (const id of ["open-photo", "edit-photo"]) {
    /** @type {HTMLButtonElement} */ (byId(id)).disabled = !model.segment;
  }
  byId("no-parser").hidden = model.segment;
  const examples = loadExamples(model).catch(() => []);
  const hasPicture = await openLink();
  const found = await examples;
  showExamples(found, model, ({ name, mask: example }) => starter.begin(onBoard(example, model), name));
  if (!hasPicture) {
    const first = found[0]?.mask ?? blankMask(1, 1, backgroundOf(model.names));
    starter.begin(onBoard(first, model), "example", { forget: true });
  }
  window.addEventListener("hashchange", openLink);
}

/** Asks the server for its model until it answers. */
async function connect() {
  showPhase("busy");
  for (let wait = 500; ; wait = Math.min(5000, 1.5 * wait)) {
    try {
      const model = await client.model();
      hideError();
      return await begin(model);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401) {
        showPhase("locked");
        return unlock(error, connect);
      }
      showPhase("offline");
      const text = error.status === 0 ? "The server cannot be reached." : sentence(error);
      showError(`${text} The page tries again by itself.`, { isTransient: true });
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

wireMessages();
wireDialogs();
wirePalette(store);
wireTools(store);
wireSettings(store);
wirePhoto();
wireHistory();
wireShortcuts(store, board, moveInHistory);
wireMenus();
wireSharing(store, mask);
mask.addEventListener("draw", () => {
  byId("mask").dataset.version = String(mask.version);
  if (board.isStroking) repainter.draft();
});
mask.addEventListener("commit", requestSoon);
store.watch(["seeds", "mode", "steps", "guidance", "photo"], requestSoon);
store.watch(["tool", "value", "size", "isMirrored"], () => board.refresh());
connect();
