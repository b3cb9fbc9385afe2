// What is to be drawn: the values of the form, kept in this browser, and the request that they make.

import { say } from "./bus.js";
import { keep, recollect } from "./memory.js";
import { formOf, takes } from "./models.js";

/** Fields that mean the same with every model. The others are kept for each: one model's numbers mean nothing to another. */
const SHARED = new Set(["prompt", "negative_prompt", "seed", "count", "image", "mask", "reference"]);
export const PICTURES = ["image", "mask", "reference"];

/** Fields that mean nothing unless another one is set, and whether it is. */
const NEEDS = {
  strength: (value) => value("image") !== null,
  mask: (value) => value("image") !== null,
  cache_threshold: (value) => value("cache") !== "none",
};

/** Fields whose own value depends on others: no prompt is written out by itself where a picture is started from. */
const OWN = { upsample: (field) => Boolean(field.default) && !state.shared.image };

const state = { model: null, shared: {}, own: {}, grid: null, ...recollect("wish", {}) };

let saving = 0;

function changed(name) {
  clearTimeout(saving);
  saving = setTimeout(() => keep("wish", state), 150);
  say("wish", name);
}

addEventListener("pagehide", () => keep("wish", state));

/** The chosen model's name. */
export const chosenModel = () => state.model;

export function chooseModel(name) {
  state.model = name;
  changed("model");
}

let present = null;

/** The form of the chosen model, or null before openForm. */
export const presentForm = () => present;

/** Fetch the form of the chosen model and make it the present form. */
export async function openForm() {
  present = await formOf(state.model);
  return present;
}

const drawer = (name) => (SHARED.has(name) ? state.shared : (state.own[state.model] ??= {}));

/** The model's own value of a field. */
const ownOf = (field) => OWN[field.name]?.(field) ?? field.default;

/** A field's value: what was given, else the model's own. */
export function valueOf(field) {
  const given = drawer(field.name)[field.name];
  return given === undefined ? ownOf(field) : given;
}

/** Whether a value was given that is not the model's own. */
export const isGiven = (field) => !same(valueOf(field), ownOf(field));

/** Give a field a value; null, or the model's own, takes it back. */
export function give(field, value) {
  if (value === null || same(value, ownOf(field))) delete drawer(field.name)[field.name];
  else drawer(field.name)[field.name] = value;
  changed(field.name);
}

/** Whether a field means anything as things stand. */
export function matters(form, name) {
  return NEEDS[name]?.((other) => (takes(form, other) ? valueOf(form.get(other)) : null)) ?? true;
}

/** The grid, or null: {x: {field, values}, y: {field, values} or null}. */
export const grid = () => state.grid;

export function giveGrid(value) {
  state.grid = value;
  changed("grid");
}

/** The request as it goes to the server: only what differs from the model's own, and means something. */
export function request(form) {
  const made = { model: state.model };
  for (const field of form.values()) {
    if (field.effect !== "honours" || !isGiven(field) || !matters(form, field.name)) continue;
    made[field.name] = valueOf(field);
  }
  return made;
}

/**
 * Take a request over into the form of its model, and forget what was there. keepSeed: false leaves the seed open.
 * Returns the names of the fields that the model does not take.
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
    } else if ((name in OWN || !same(value, field.default)) && (keepSeed || name !== "seed")) drawer(name)[name] = value;
  }
  changed("all");
  return left;
}

/** Whether two values are the same; pictures are lists. */
function same(a, b) {
  return Array.isArray(a) && Array.isArray(b) ? a.length === b.length && a.every((one, i) => one === b[i]) : a === b;
}
