// The models that the server offers, and the form of each.

import { get } from "./api.js";

let list = [];
const forms = new Map();

/** Ask the server. The first model is its default. */
export async function loadModels() {
  list = (await get("/v1/models")).data;
  return list;
}

/** What is offered. */
export const models = () => list;

/** One model's entry; undefined where it is not offered. */
export const modelOf = (name) => list.find((model) => model.id === name);

/** The fields of a model by name. Waits where the engine still reads what the model is. */
export async function formOf(name) {
  if (!forms.has(name)) {
    const form = await patiently(() => get(`/v1/models/${encodeURIComponent(name)}/form`));
    forms.set(name, new Map(form.fields.map((field) => [field.name, field])));
  }
  return forms.get(name);
}

/** Whether a model takes a field: one that it ignores or rejects is not offered. */
export const takes = (form, name) => form.get(name)?.effect === "honours";

/** The fields that a form shows. */
export const shown = (form) => [...form.values()].filter((field) => field.effect === "honours");

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
