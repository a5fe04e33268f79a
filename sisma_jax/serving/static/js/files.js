/** The part "Start from": empty masks, files and photographs. */

import { ApiError } from "./api.js";
import { backgroundOf } from "./classes.js";
import { byId } from "./dom.js";
import { blankMask } from "./mask.js";
import { announce, hideError, sentence, showError } from "./messages.js";
import { boardSide, onBoard, openMask, openMaskOfPhoto, openPhoto } from "./opening.js";

/** @typedef {import("./store.js").Store<import("./state.js").State>} Store */

/**
 * @typedef {object} Parts
 * @property {Store} store
 * @property {import("./history.js").MaskDocument} mask
 * @property {import("./api.js").Client} client
 * @property {import("./board.js").Board} board
 * @property {(reason: Error, proceed: () => void) => Promise<void>} unlock - asks for the API key.
 */

/** Brings masks and photographs to the board. */
export class Starter {
  #parts;

  /** @param {Parts} parts */
  constructor(parts) {
    this.#parts = parts;
    this.#openers = /** @type {Record<string, (file: File) => Promise<void>>} */ ({
      "open-mask": async (file) => this.begin(await openMask(file, this.model), "mask from a file"),
      "open-photo": async (file) => {
        this.begin(await openMaskOfPhoto(file, this.model, parts.client), "mask of a photograph");
      },
      "edit-photo": (file) => this.#edit(file),
    });
    this.#wire();
  }

  #openers;

  get model() {
    const { model } = this.#parts.store.get();
    if (!model) throw new Error("The server has not answered yet.");
    return model;
  }

  /**
   * Shows a mask for new faces.
   * @param {import("./mask.js").Mask} made - at the size of the board.
   * @param {string} label - what undo says.
   * @param {{forget?: boolean}} [options] - forget: nothing before it can be undone.
   */
  begin(made, label, { forget = false } = {}) {
    const { board, store, mask } = this.#parts;
    const wasPhoto = store.get().photo !== null;
    board.abandon();
    store.set({ photo: null });
    mask.replace(made, label, { forget: forget || wasPhoto });
  }

  /** @param {File} file */
  async #edit(file) {
    const { board, store, mask, client } = this.#parts;
    const photo = await openPhoto(file, this.model, client);
    board.abandon();
    store.set({ photo, faces: null });
    mask.replace(photo.before, "photograph", { forget: true });
    announce(`Editing ${photo.name}. Change its mask, and the photograph changes there.`);
  }

  /**
   * Opens a file, and says what is wrong with it.
   * @param {(file: File) => Promise<void>} open
   * @param {File} file
   */
  async #open(open, file) {
    const retry = () => this.#open(open, file);
    byId("opening").hidden = false;
    try {
      await open(file);
      hideError();
    } catch (error) {
      if (error instanceof ApiError && error.status === 401) await this.#parts.unlock(error, retry);
      else showError(sentence(error), { retry });
    } finally {
      byId("opening").hidden = true;
    }
  }

  /**
   * A file that was dropped is a mask if it can be one, else a photograph.
   * @param {File} file
   */
  async #openDropped(file) {
    try {
      await this.#openers["open-mask"](file);
    } catch (error) {
      if (!this.model.segment) throw error;
      await this.#openers["open-photo"](file);
    }
  }

  #wire() {
    for (const [id, open] of Object.entries(this.#openers)) {
      const input = /** @type {HTMLInputElement} */ (byId(`${id}-file`));
      byId(id).addEventListener("click", () => input.click());
      input.addEventListener("change", () => {
        const [file] = input.files ?? [];
        if (file) this.#open(open, file);
        input.value = "";
      });
    }
    byId("blank").addEventListener("click", () => {
      const side = boardSide(this.model);
      this.begin(blankMask(side, side, backgroundOf(this.model.names)), "empty mask");
    });
    byId("stop-editing").addEventListener("click", () => {
      this.begin(onBoard(this.#parts.mask.mask, this.model), "mask");
    });
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      const [file] = event.dataTransfer?.files ?? [];
      if (file) this.#open((dropped) => this.#openDropped(dropped), file);
    });
  }
}
