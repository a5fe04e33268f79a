/** The state of the page: one object, and those who watch it. */

/**
 * @template {object} T
 * @typedef {object} Store
 * @property {() => Readonly<T>} get - the current state.
 * @property {(changes: Partial<T>) => void} set - merges changes, and calls the watchers whose keys changed.
 * @property {(keys: (keyof T)[], react: (state: Readonly<T>) => void) => () => void} watch - calls `react` now and after
 *   each change of one of the keys; returns a function that stops it.
 */

/**
 * Returns a store. Values are compared by identity, so lists and objects are replaced, never changed in place.
 * @template {object} T
 * @param {T} initial
 * @returns {Store<T>}
 */
export function createStore(initial) {
  let state = { ...initial };
  /** @type {Set<{keys: (keyof T)[], react: (state: Readonly<T>) => void}>} */
  const watchers = new Set();
  return {
    get: () => state,
    set(changes) {
      const keys = /** @type {(keyof T)[]} */ (Object.keys(changes));
      const changed = keys.filter((key) => !Object.is(changes[key], state[key]));
      if (!changed.length) return;
      state = { ...state, ...changes };
      for (const { keys, react } of [...watchers]) {
        if (changed.some((key) => keys.includes(key))) react(state);
      }
    },
    watch(keys, react) {
      const watcher = { keys, react };
      watchers.add(watcher);
      react(state);
      return () => watchers.delete(watcher);
    },
  };
}
