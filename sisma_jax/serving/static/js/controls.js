/** Tools, settings and the buttons around the board, bound to the state. */

import { byId } from "./dom.js";
import { MOST_VARIATIONS, randomSeed, withCount } from "./state.js";

/** @typedef {import("./store.js").Store<import("./state.js").State>} Store */

const MOST_GUIDANCE = 6;
const MOST_STEPS = 50;

/**
 * Binds radio buttons to a key of the state.
 * @param {string} name - of the radio buttons.
 * @param {(value: string) => void} choose
 * @returns {(value: string) => void} shows a value.
 */
function radios(name, choose) {
  const buttons = /** @type {NodeListOf<HTMLInputElement>} */ (document.querySelectorAll(`input[name="${name}"]`));
  buttons.forEach((button) => button.addEventListener("change", () => choose(button.value)));
  return (value) => buttons.forEach((button) => (button.checked = button.value === value));
}

/**
 * Binds a slider to the state.
 * @param {string} id
 * @param {(value: number) => void} choose
 * @returns {(value: number, bounds?: [number, number]) => void} shows a value.
 */
function slider(id, choose) {
  const input = /** @type {HTMLInputElement} */ (byId(id));
  const output = byId(`${id}-value`);
  input.addEventListener("input", () => choose(Number(input.value)));
  return (value, bounds) => {
    if (bounds) [input.min, input.max] = bounds.map(String);
    input.value = String(value);
    output.textContent = String(value);
  };
}

/**
 * Tools, width of the brush and mirrored drawing.
 * @param {Store} store
 */
export function wireTools(store) {
  const showTool = radios("tool", (tool) => store.set({ tool: /** @type {import("./tools.js").Tool} */ (tool) }));
  const showSize = slider("size", (size) => store.set({ size }));
  const mirror = byId("mirror");
  mirror.addEventListener("click", () => store.set({ isMirrored: !store.get().isMirrored }));
  store.watch(["tool"], ({ tool }) => showTool(tool));
  store.watch(["size"], ({ size }) => showSize(size));
  store.watch(["isMirrored"], ({ isMirrored }) => mirror.setAttribute("aria-pressed", String(isMirrored)));
}

/**
 * Mode, guidance, steps, person and variations.
 * @param {Store} store
 */
export function wireSettings(store) {
  const showMode = radios("mode", (mode) => store.set({ mode: mode === "quality" ? "quality" : "live" }));
  const showCount = radios("count", (count) => {
    const { seeds, selected } = store.get();
    store.set(withCount(seeds, selected, Number(count)));
  });
  const showGuidance = slider("guidance", (guidance) => store.set({ guidance }));
  const showSteps = slider("steps", (chosen) => {
    const { steps, mode, areStepsChosen } = store.get();
    store.set({ steps: { ...steps, [mode]: chosen }, areStepsChosen: areStepsChosen || mode === "live" });
  });
  store.watch(["model"], ({ model }) => {
    if (!model) return;
    const [low, high] = model.limits.guidance;
    showGuidance(store.get().guidance, [low, Math.max(Math.min(high, MOST_GUIDANCE), model.defaults.guidance)]);
    const most = Math.max(Math.min(model.limits.steps[1], MOST_STEPS), model.defaults.steps);
    showSteps(store.get().steps[store.get().mode], [1, most]);
    const mostFaces = Math.min(model.limits.num_samples[1], MOST_VARIATIONS);
    document.querySelectorAll('input[name="count"]').forEach((button) => {
      const input = /** @type {HTMLInputElement} */ (button);
      input.disabled = Number(input.value) > mostFaces;
    });
  });
  store.watch(["mode"], ({ mode }) => showMode(mode));
  store.watch(["guidance"], ({ guidance }) => showGuidance(guidance));
  store.watch(["steps", "mode"], ({ steps, mode }) => showSteps(steps[mode]));
  store.watch(["seeds"], ({ seeds }) => showCount(String(seeds.length)));
  wirePerson(store);
}

/** @param {Store} store */
function wirePerson(store) {
  const seed = /** @type {HTMLInputElement} */ (byId("seed"));
  const keep = /** @type {HTMLInputElement} */ (byId("keep"));
  seed.addEventListener("change", () => {
    const { seeds, selected } = store.get();
    const given = Number(seed.value);
    const isValid = seed.value !== "" && Number.isInteger(given) && given >= 0 && given < 2 ** 32;
    if (isValid) store.set({ seeds: seeds.with(selected, given) });
    else seed.value = String(seeds[selected]);
  });
  keep.addEventListener("change", () => store.set({ isKept: keep.checked }));
  byId("new-person").addEventListener("click", () => newPerson(store));
  store.watch(["seeds", "selected"], ({ seeds, selected }) => (seed.value = String(seeds[selected])));
  store.watch(["isKept"], ({ isKept }) => (keep.checked = isKept));
}

/**
 * Takes other seeds.
 * @param {Store} store
 */
export function newPerson(store) {
  store.set({ seeds: store.get().seeds.map(randomSeed) });
}
