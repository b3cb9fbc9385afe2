// The values of the form, which the browser stores, and the request that is made of them.

import { say } from "./bus.js";
import { keep, recollect } from "./memory.js";
import { formOf, takes } from "./models.js";

/** Fields whose values all models share. Values of other fields are stored for each model. */
const SHARED = new Set(["prompt", "negative_prompt", "seed", "count", "image", "mask", "reference"]);
export const PICTURES = ["image", "mask", "reference", "control"];

const isMasked = (value) => value("image") !== null && (value("mask") !== null || Boolean(value("mask_from")));
const isPartial = (value) => isMasked(value) || (value("image") !== null && Boolean(value("extend")));

/** Fields that have no effect unless another field is set -> the test of that field. */
const NEEDS = {
  strength: (value) => value("image") !== null,
  mask: (value) => value("image") !== null,
  mask_from: (value) => value("image") !== null,
  extend: (value) => value("image") !== null,
  mask_invert: isMasked,
  mask_grow: isPartial,
  mask_blur: isPartial,
  mask_soft: isPartial,
  mask_fill: isPartial,
  crop: isPartial,
  upscaler: (value) => Boolean(value("upscale")) || value("image") !== null,
  upscale_strength: (value) => Boolean(value("upscale")),
  cache_threshold: (value) => value("cache") !== "none",
};

/** Fields whose default depends on other fields. With a start picture, `upsample` is off by default. */
const OWN = { upsample: (field) => Boolean(field.default) && !state.shared.image };

const state = { model: null, shared: {}, own: {}, grid: null, ...recollect("wish", {}) };

let held = Promise.resolve();

/** Let the next request wait for work that gives a field its value, such as an upload. */
export const hold = (work) => (held = work);

/** Wait for the work that was given to `hold`. */
export const settled = () => held;

let saving = 0;

function changed(name) {
  clearTimeout(saving);
  saving = setTimeout(() => keep("wish", state), 150);
  say("wish", name);
}

addEventListener("pagehide", () => keep("wish", state));

/** Return the chosen model's name. */
export const chosenModel = () => state.model;

export function chooseModel(name) {
  state.model = name;
  changed("model");
}

let present = null;

/** Return the form of the chosen model, or null before openForm. */
export const presentForm = () => present;

/** Fetch the form of the chosen model and make it the present form. */
export async function openForm() {
  present = await formOf(state.model);
  return present;
}

const drawer = (name) => (SHARED.has(name) ? state.shared : (state.own[state.model] ??= {}));

/** Return a field's default. */
const ownOf = (field) => OWN[field.name]?.(field) ?? field.default;

/** Return a field's value: the given one, or else the default. */
export function valueOf(field) {
  const given = drawer(field.name)[field.name];
  return given === undefined ? ownOf(field) : given;
}

/** Return whether a field has a value other than its default. */
export const isGiven = (field) => !same(valueOf(field), ownOf(field));

/** Set a field's value. null and the default clear it. */
export function give(field, value) {
  if (value === null || same(value, ownOf(field))) delete drawer(field.name)[field.name];
  else drawer(field.name)[field.name] = value;
  changed(field.name);
}

/** Return whether a field has an effect with the present values. */
export function matters(form, name) {
  return NEEDS[name]?.((other) => (takes(form, other) ? valueOf(form.get(other)) : null)) ?? true;
}

/** Return the grid, {x: {field, values}, y: {field, values} or null}, or null. */
export const grid = () => state.grid;

export function giveGrid(value) {
  state.grid = value;
  changed("grid");
}

/** Return the request for the server: only values that differ from defaults and have an effect. */
export function request(form) {
  const made = { model: state.model };
  for (const field of form.values()) {
    if (field.effect !== "honours" || !isGiven(field) || !matters(form, field.name)) continue;
    made[field.name] = valueOf(field);
  }
  return made;
}

/**
 * Replace the values of the form by a request's. keepSeed: whether to take the seed, too. Returns the names of fields
 * that the model does not take.
 */
export function recall(made, form, { keepSeed = true } = {}) {
  state.shared = {};
  state.own[state.model] = {};
  state.grid = null;
  const left = [];
  for (const [name, value] of Object.entries(made)) {
    if (name === "model" || value === null) continue;
    const field = form.get(name);
    if (!field || field.effect !== "honours") {
      if (field && !same(value, field.default)) left.push(name);
    } else if ((name in OWN || !same(value, field.default)) && (keepSeed || name !== "seed"))
      drawer(name)[name] = value;
  }
  changed("all");
  return left;
}

/** Return whether two values are equal. Lists are compared item by item. */
function same(a, b) {
  return Array.isArray(a) && Array.isArray(b) ? a.length === b.length && a.every((one, i) => one === b[i]) : a === b;
}
