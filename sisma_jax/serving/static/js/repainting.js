/** When faces are asked for: after each change, at most one request at a time, older ones cancelled, failed ones again. */

import { ApiError } from "./api.js";

/**
 * @typedef {object} Job - a picture that can be asked for.
 * @property {string} key - equal keys mean equal pictures.
 * @property {boolean} isLive - whether it is quick enough to follow a stroke.
 * @property {(signal: AbortSignal) => Promise<void>} run - asks for it, and shows it.
 */

/** @typedef {"idle" | "busy" | "again" | "offline" | "locked" | "failed"} Phase */

const READY_POLL_SECS = [0.5, 1, 2, 3, 5];
const MOST_RETRY_SECS = 30;
// A job that took longer does not follow the pointer, only the end of a stroke.
const LIVE_MS = 250;

/** Runs jobs, one at a time. */
export class Repainter {
  #current = /** @type {{key: string, cancel: AbortController} | null} */ (null);
  #shown = "";
  #lastMs = 0;
  #timer = 0;
  #polls = 0;

  /**
   * @param {() => Job | null} job - the picture of the current state, or null if there is nothing to ask for.
   * @param {(phase: Phase, error: ApiError | null, waitSecs: number) => void} onPhase
   * @param {() => Promise<boolean>} isReady - whether the server accepts work.
   */
  constructor(job, onPhase, isReady) {
    this.job = job;
    this.onPhase = onPhase;
    this.isReady = isReady;
  }

  /** The pixels changed within a stroke: asks for the face if nothing is on its way. */
  draft() {
    const job = this.job();
    if (job?.isLive && !this.#current && !this.#timer && this.#lastMs < LIVE_MS && job.key !== this.#shown) {
      this.#start(job);
    }
  }

  /**
   * The state changed: asks for its face, and cancels the request for an older one.
   * @param {{force?: boolean}} [options] - force: also if the face is already shown.
   */
  request({ force = false } = {}) {
    const job = this.job();
    if (!job) {
      this.cancel();
      this.#shown = "";
      return;
    }
    if (this.#current?.key === job.key || (!force && this.#shown === job.key && !this.#current)) return;
    this.cancel();
    this.#start(job);
  }

  /** Cancels what is on its way. */
  cancel() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#current?.cancel.abort();
    this.#current = null;
    this.onPhase("idle", null, 0);
  }

  /** @param {Job} job */
  async #start(job) {
    const current = { key: job.key, cancel: new AbortController() };
    this.#current = current;
    this.onPhase("busy", null, 0);
    const started = performance.now();
    try {
      await job.run(current.cancel.signal);
      if (this.#current !== current) return;
      this.#lastMs = performance.now() - started;
      this.#shown = job.key;
      this.#polls = 0;
      this.#current = null;
      this.onPhase("idle", null, 0);
    } catch (error) {
      if (this.#current !== current) return;
      this.#current = null;
      this.#recover(error);
    }
  }

  /** @param {unknown} error */
  #recover(error) {
    if (!(error instanceof ApiError)) {
      this.onPhase("failed", new ApiError(String(error instanceof Error ? error.message : error), -1), 0);
      throw error;
    }
    if (error.status === 401) return this.onPhase("locked", error, 0);
    if (error.status === 409) return this.onPhase("idle", null, 0);
    if (!error.isTemporary) return this.onPhase("failed", error, 0);
    const isOffline = error.status === 0 || error.status === 502;
    const wait = isOffline
      ? READY_POLL_SECS[Math.min(this.#polls++, READY_POLL_SECS.length - 1)]
      : Math.min(error.retryAfterSecs ?? 2, MOST_RETRY_SECS);
    this.onPhase(isOffline ? "offline" : "again", error, wait);
    this.#timer = setTimeout(async () => {
      const timer = this.#timer;
      const isReady = !isOffline || (await this.isReady());
      if (this.#timer !== timer) return;
      this.#timer = 0;
      if (isReady) this.request({ force: true });
      else this.#recover(error);
    }, wait * 1000);
  }
}
