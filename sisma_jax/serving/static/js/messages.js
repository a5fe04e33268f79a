/** What the page says: to the eye in a banner and a status, to a screen reader in live regions. */

import { byId } from "./dom.js";

/** @typedef {import("./repainting.js").Phase} Phase */

const STATUS = /** @type {Record<Phase, string>} */ ({
  idle: "Ready",
  busy: "Painting",
  again: "Waiting",
  offline: "Offline",
  locked: "Key needed",
  failed: "Error",
});

/**
 * Says something to screen readers, without interrupting them.
 * @param {string} text
 */
export function announce(text) {
  const region = byId("announcer");
  // The same text again is announced only if the region changes.
  region.textContent = region.textContent === text ? `${text}\u00a0` : text;
}

/**
 * Shows an error until it is closed or another one takes its place.
 * @param {string} text
 * @param {{retry?: () => void, isTransient?: boolean}} [options] - transient: it goes when the server answers again.
 */
export function showError(text, { retry, isTransient = false } = {}) {
  const banner = byId("banner");
  byId("banner-text").textContent = text;
  const button = byId("banner-retry");
  button.hidden = !retry;
  button.onclick = retry ?? null;
  banner.dataset.transient = String(isTransient);
  banner.hidden = false;
}

/** @param {{onlyTransient?: boolean}} [options] */
export function hideError({ onlyTransient = false } = {}) {
  const banner = byId("banner");
  if (!onlyTransient || banner.dataset.transient === "true") banner.hidden = true;
}

/**
 * Shows what the server does.
 * @param {Phase} phase
 */
export function showPhase(phase) {
  const status = byId("status");
  status.dataset.phase = phase;
  byId("status-text").textContent = STATUS[phase];
}

/** Makes the buttons of the banner work. */
export function wireMessages() {
  byId("banner-close").addEventListener("click", () => hideError());
}

/**
 * Returns a message as a sentence.
 * @param {unknown} error
 */
export function sentence(error) {
  const text = error instanceof Error ? error.message : String(error);
  const capital = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}
