/** Small helpers for elements. */

/**
 * Returns the element with an id.
 * @template {HTMLElement} T
 * @param {string} id
 * @returns {T}
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element has the id ${id}`);
  return /** @type {T} */ (found);
}

/**
 * Returns a new element.
 * @param {string} tag
 * @param {Record<string, unknown>} [properties] - of the element; names with a hyphen are attributes.
 * @param {...(Node | string)} children
 * @returns {any}
 */
export function element(tag, properties = {}, ...children) {
  const made = /** @type {any} */ (document.createElement(tag));
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) made.setAttribute(name, String(value));
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/**
 * Gives a file to the user.
 * @param {Blob} blob
 * @param {string} name
 */
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = element("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/**
 * Returns whether typing goes into an element, so that single keys are no shortcuts.
 * @param {EventTarget | null} target
 */
export function takesText(target) {
  if (!(target instanceof HTMLElement)) return false;
  const takesLetters = target instanceof HTMLInputElement && !["radio", "checkbox", "range"].includes(target.type);
  return takesLetters || target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement;
}
