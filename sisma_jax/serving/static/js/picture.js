/** The picture of the current state: what is asked for, and how the answer is shown. */

import { equalMasks } from "./mask.js";
import { liveSteps } from "./state.js";

/** @typedef {import("./store.js").Store<import("./state.js").State>} Store */
/** @typedef {import("./repainting.js").Job} Job */

/** Images that a stream shows before the last one. */
const STREAMED = 12;

/**
 * @typedef {object} Parts
 * @property {Store} store
 * @property {import("./history.js").MaskDocument} mask
 * @property {import("./api.js").Client} client
 * @property {import("./faces.js").FaceView} view
 * @property {(step: number, steps: number) => void} onProgress - 0 steps: there is no progress to show.
 * @property {(milliseconds: number) => void} onDone - the time from the request to the picture.
 */

/**
 * Returns the job for the current state, or null if there is nothing to ask the server for.
 * @param {Parts} parts
 * @returns {Job | null}
 */
export function currentJob(parts) {
  const { model, mode, steps, guidance, seeds, photo } = parts.store.get();
  if (!model || (photo && equalMasks(photo.before, parts.mask.mask))) return null;
  const settings = { seeds, steps: steps[mode], guidance };
  const key = JSON.stringify([parts.mask.version, settings, mode, photo?.name ?? null]);
  const isStream = mode === "quality" && !photo && settings.steps > 1 && seeds.length <= model.limits.stream_images;
  const { version } = parts.mask;
  return {
    key,
    isLive: mode === "live",
    async run(signal) {
      await (isStream ? runStream : runOnce)(parts, settings, signal);
      parts.view.version = version;
    },
  };
}

/**
 * @param {Parts} parts
 * @param {import("./api.js").Settings} settings
 * @param {AbortSignal} signal
 */
async function runOnce({ store, mask, client, view, onProgress, onDone }, settings, signal) {
  const started = performance.now();
  const { photo, mode } = store.get();
  onProgress(0, 0);
  const faces = photo
    ? await client.edit(
        mode === "quality" ? photo.original : photo.preview, photo.before, mask.mask, settings, signal)
    : await client.sample(mask.mask, settings, signal);
  await view.show(faces.images, signal);
  store.set({ faces });
  onDone(performance.now() - started);
}

/**
 * @param {Parts} parts
 * @param {import("./api.js").Settings} settings
 * @param {AbortSignal} signal
 */
async function runStream({ store, mask, client, view, onProgress, onDone }, settings, signal) {
  const started = performance.now();
  const every = Math.ceil(settings.steps / STREAMED);
  onProgress(0, settings.steps);
  for await (const part of client.stream(mask.mask, { ...settings, every }, signal)) {
    await view.show(part.images, signal);
    onProgress(part.step, part.steps);
    if (part.faces) store.set({ faces: part.faces });
  }
  onDone(performance.now() - started);
}

/**
 * Sets the steps of the live mode by the time that the server needs for one.
 * @param {Store} store
 * @param {import("./api.js").Faces} faces - of the first request.
 */
export function calibrate(store, faces) {
  const { model, steps, areStepsChosen, mode } = store.get();
  if (areStepsChosen || mode !== "live" || !model || !faces.computeMs) return;
  const live = liveSteps(faces.computeMs / steps.live, model.defaults.steps);
  store.set({ areStepsChosen: true, steps: { ...steps, live } });
}
