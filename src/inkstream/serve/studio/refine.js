// Refining: picked pictures are drawn again with their prompts, by a better model or larger.

import { get } from "./api.js";
import { openDialog } from "./dialog.js";
import { h, icon } from "./dom.js";
import { submit } from "./draw.js";
import { formOf, models, takes } from "./models.js";
import { complain, guarded, notice } from "./notice.js";
import { uploadOf } from "./pictures.js";
import { view } from "./views.js";
import { chosenModel } from "./wish.js";
import { fieldTitle, t } from "./words.js";

const SCALES = [1, 1.5, 2];
const STRENGTH = 0.5;

/** Fields that are copied from a picture's request. The others, such as steps, mean little to another model. */
const TAKEN = ["prompt", "negative_prompt", "seed"];

/** Return the field by which a model takes a picture to refine: `reference`, `image` or null. */
export function wayOf(form) {
  if ([...form.values()].some((field) => field.needed)) return null; // the model needs other input pictures
  return takes(form, "reference") ? "reference" : takes(form, "image") ? "image" : null;
}

/** Return the request that refines a picture. upload: the picture's name on the server. */
export function refinement(picture, form, { model, upload, strength, scale }) {
  const made = { model };
  for (const name of TAKEN) if (picture.request[name] && takes(form, name)) made[name] = picture.request[name];
  for (const side of ["width", "height"]) {
    const unit = form.get(side).step ?? 16;
    made[side] = Math.max(unit, Math.round((picture[side] * scale) / unit) * unit);
  }
  if (wayOf(form) === "reference") made.reference = [upload];
  else Object.assign(made, { image: upload, strength });
  return made;
}

/** Open the dialog of refining. It queues one job for each picture. */
export async function openRefine(pictures) {
  let ways;
  try {
    const forms = await Promise.all(models().map(async ({ id }) => [id, await formOf(id)]));
    ways = new Map(forms.filter(([, form]) => wayOf(form)));
  } catch (error) {
    complain(error);
    return;
  }
  if (!ways.size) {
    notice(t("noRefiner"), { kind: "error" });
    return;
  }
  const model = h(
    "select",
    { id: "refine-model" },
    [...ways.keys()].map((id) => h("option", { value: id }, id)),
  );
  model.value = ways.has(chosenModel()) ? chosenModel() : ways.keys().next().value;
  const strength = h("input", { type: "range", id: "refine-strength", min: 0.05, max: 1, step: 0.05, value: STRENGTH });
  const shown = h("output", { for: "refine-strength" }, String(STRENGTH));
  strength.addEventListener("input", () => (shown.textContent = strength.value));
  const scale = h(
    "select",
    { id: "refine-scale" },
    SCALES.map((by) => h("option", { value: by }, `${by} ×`)),
  );
  const how = h(
    "div",
    { class: "field" },
    h("div", { class: "field-head" }, h("label", { for: "refine-strength" }, fieldTitle("strength")), shown),
    strength,
    h("p", { class: "quiet" }, t("refineStrength")),
  );
  const suit = () => (how.hidden = wayOf(ways.get(model.value)) !== "image");
  model.addEventListener("change", suit);
  suit();
  const go = h("button", { type: "button", class: "primary" }, icon("spark"), t("refineCount", { n: pictures.length }));
  go.addEventListener(
    "click",
    guarded(async () => {
      go.disabled = true;
      try {
        for (const picture of pictures)
          await one(picture, ways.get(model.value), {
            model: model.value,
            strength: Number(strength.value),
            scale: Number(scale.value),
          });
        dialog.close();
        view("queue", { onlyNarrow: true });
      } finally {
        go.disabled = false;
      }
    }),
  );
  const dialog = openDialog(
    "refine",
    t("refine"),
    h(
      "div",
      { class: "sheet-tiles few" },
      pictures.slice(0, 12).map((picture) => h("img", { src: picture.thumbnail, alt: picture.prompt })),
    ),
    h("div", { class: "field" }, h("label", { for: "refine-model" }, t("model")), model),
    how,
    h("div", { class: "field" }, h("label", { for: "refine-scale" }, t("refineScale")), scale),
    h("footer", {}, go),
  );
}

async function one(picture, form, wish) {
  const whole = picture.request ? picture : await get(`/v1/pictures/${picture.id}`);
  await submit(refinement(whole, form, { ...wish, upload: await uploadOf(whole) }), {
    note: `refined from ${picture.id}`,
  });
}
