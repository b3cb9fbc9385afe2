// The server's models, and the form of each: its fields by name.

import { get } from "./api.js";

let list = [];
const forms = new Map();

/** Fetch the list of models. The first model is the default. */
export async function loadModels() {
  list = (await get("/v1/models")).data;
  return list;
}

/** Return the offered models. */
export const models = () => list;

/** Return a model's entry, or undefined if the model is not offered. */
export const modelOf = (name) => list.find((model) => model.id === name);

/** Return the fields of a model by name. Retries while the engine is still reading the model's files. */
export async function formOf(name) {
  if (!forms.has(name)) {
    const form = await patiently(() => get(`/v1/models/${encodeURIComponent(name)}/form`));
    forms.set(name, new Map(form.fields.map((field) => [field.name, field])));
  }
  return forms.get(name);
}

/** Return whether a model takes a field. The page does not offer fields that the model ignores or rejects. */
export const takes = (form, name) => form.get(name)?.effect === "honours";

/** A field that the form does not have: it is beside the control of `control`. */
const WITHOUT = ["control_nets"];

/** Return the fields that a form shows. */
export const shown = (form) =>
  [...form.values()].filter((field) => field.effect === "honours" && !WITHOUT.includes(field.name));

async function patiently(work, tries = 30) {
  for (;;) {
    try {
      return await work();
    } catch (error) {
      if (error.status !== 503 || --tries <= 0) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}
