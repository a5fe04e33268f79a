/** The HTTP API of the server, as docs/http_api.md describes it. */

import { readEvents } from "./events.js";
import { encodeMask } from "./png.js";

/** @typedef {import("./mask.js").Mask} Mask */
/** @typedef {import("./classes.js").Model} Model */

/**
 * @typedef {object} Faces
 * @property {Blob[]} images - PNG files, one per seed.
 * @property {number[]} seeds
 * @property {number} width
 * @property {number} height
 * @property {Record<string, unknown>} settings
 * @property {number} [computeMs] - time that the server computed.
 */

/**
 * @typedef {object} Settings
 * @property {number[]} seeds
 * @property {number} steps
 * @property {number} guidance
 */

/** An answer that is no result, or no answer at all. */
export class ApiError extends Error {
  /**
   * @param {string} message - what is wrong.
   * @param {number} status - of HTTP; 0 if the server cannot be reached.
   * @param {number} [retryAfterSecs]
   */
  constructor(message, status, retryAfterSecs) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.retryAfterSecs = retryAfterSecs;
  }

  /** Whether the same request can succeed later. */
  get isTemporary() {
    return [0, 408, 429, 502, 503, 504].includes(this.status);
  }
}

const KEY = "sisma_jax.api_key";

/** Sends requests. The key is kept for this tab only. */
export class Client {
  #streamId = crypto.getRandomValues(new Uint32Array(4)).join("-");
  #key = sessionStorage.getItem(KEY) ?? "";

  /** @param {string} key - of the API. */
  set key(key) {
    this.#key = key;
    sessionStorage.setItem(KEY, key);
  }

  /**
   * @param {AbortSignal} [signal]
   * @returns {Promise<Model>}
   */
  async model(signal) {
    return (await this.#send("/v1/classes", { signal })).json();
  }

  /** @returns {Promise<boolean>} whether the server accepts work. */
  async isReady() {
    try {
      return (await fetch("/readyz", { cache: "no-store" })).ok;
    } catch {
      return false;
    }
  }

  /**
   * Returns the faces for a mask.
   * @param {Mask} mask
   * @param {Settings} settings
   * @param {AbortSignal} signal
   * @returns {Promise<Faces>}
   */
  async sample(mask, settings, signal) {
    return facesOf(await this.#sample(mask, settings, signal, "application/json"));
  }

  /**
   * Yields the faces while they are computed; the last ones are finished.
   * @param {Mask} mask
   * @param {Settings & {every: number}} settings
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<{step: number, steps: number, images: Blob[], faces: Faces | null}>}
   */
  async *stream(mask, settings, signal) {
    const response = await this.#sample(mask, settings, signal, "text/event-stream");
    let isDone = false;
    try {
      for await (const { name, data } of readEvents(/** @type {ReadableStream<Uint8Array<ArrayBuffer>>} */ (response.body))) {
        if (name === "error") throw new ApiError(data.error, data.status);
        if (name === "step") yield { ...data, images: data.images.map(blobOf), faces: null };
        if (name === "done") {
          isDone = true;
          const images = data.images.map(blobOf);
          yield { step: settings.steps, steps: settings.steps, images, faces: { ...data, images } };
        }
      }
    } catch (error) {
      throw asApiError(error);
    }
    if (!isDone) throw new ApiError("the connection to the server broke", 0);
  }

  /**
   * Returns edits of a photograph: it is generated where the masks differ.
   * @param {Blob} photo
   * @param {Mask} before
   * @param {Mask} mask
   * @param {Settings} settings
   * @param {AbortSignal} signal
   * @returns {Promise<Faces>}
   */
  async edit(photo, before, mask, settings, signal) {
    const form = new FormData();
    form.set("image", photo, "photo");
    form.set("mask", png(await encodeMask(mask)), "mask.png");
    form.set("image_mask", png(await encodeMask(before)), "before.png");
    for (const [name, value] of Object.entries({ classes: "model", ...settings })) form.set(name, String(value));
    return facesOf(await this.#post("/v1/edit", form, "application/json", signal));
  }

  /**
   * Returns the PNG file of a photograph's mask.
   * @param {Blob} photo
   * @param {{whole: boolean}} options - whole: the mask of the whole photograph, not that of its largest face.
   * @returns {Promise<Uint8Array<ArrayBuffer>>}
   */
  async segment(photo, { whole }) {
    const form = new FormData();
    form.set("photo", photo, "photo");
    form.set("whole", String(whole));
    const response = await this.#post("/v1/segment", form, "image/png");
    return new Uint8Array(await response.arrayBuffer());
  }

  /**
   * @param {Mask} mask
   * @param {Settings} settings
   * @param {AbortSignal} signal
   * @param {string} accept
   */
  async #sample(mask, settings, signal, accept) {
    const fields = Object.entries({ classes: "model", ...settings }).map(([name, value]) => [name, String(value)]);
    const body = png(await encodeMask(mask));
    return this.#post(`/v1/sample?${new URLSearchParams(fields)}`, body, accept, signal);
  }

  /**
   * @param {string} path
   * @param {Blob | FormData} body
   * @param {string} accept
   * @param {AbortSignal} [signal]
   */
  #post(path, body, accept, signal) {
    // What cannot be cancelled is not superseded either: a mask of a photograph is wanted even if painting goes on.
    const headers = new Headers({ Accept: accept });
    if (signal) headers.set("X-Stream-Id", this.#streamId);
    return this.#send(path, { method: "POST", body, signal, headers });
  }

  /**
   * @param {string} path
   * @param {RequestInit} options
   * @returns {Promise<Response>}
   */
  async #send(path, options) {
    const headers = new Headers(options.headers);
    if (this.#key) headers.set("Authorization", `Bearer ${this.#key}`);
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      throw asApiError(error);
    }
    if (response.ok) return response;
    const problem = await response.json().catch(() => null);
    const wait = Number(response.headers.get("Retry-After"));
    throw new ApiError(problem?.error ?? `the server answered ${response.status}`, response.status, wait || undefined);
  }
}

/** @param {unknown} error */
function asApiError(error) {
  if (error instanceof ApiError || (error instanceof DOMException && error.name === "AbortError")) return error;
  if (error instanceof TypeError) return new ApiError("the server cannot be reached", 0);
  return error;
}

/** @param {Uint8Array<ArrayBuffer>} file */
function png(file) {
  return new Blob([file], { type: "image/png" });
}

/** @param {string} text - base64 of a PNG file. */
function blobOf(text) {
  return png(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)));
}

/**
 * @param {Response} response
 * @returns {Promise<Faces>}
 */
async function facesOf(response) {
  const time = /compute;dur=([\d.]+)/.exec(response.headers.get("Server-Timing") ?? "");
  try {
    const value = await response.json();
    return { ...value, images: value.images.map(blobOf), computeMs: time ? Number(time[1]) : undefined };
  } catch (error) {
    throw asApiError(error);
  }
}
