// One control for each type of field. A control stores the user's choice, and `refresh` shows the stored value.

import { h, iconButton } from "./dom.js";
import { give, isGiven, valueOf } from "./wish.js";
import { fieldTitle, known, t } from "./words.js";

/** Ends of sliders for fields that take far more than the useful values. The number box beside the slider takes all. */
const FAR = { guidance: 12, shift: 12, cfg_normalization: 2, cache_threshold: 1, mask_grow: 64, mask_blur: 128 };
const NEAR = { mask_grow: -64 };

export const titleOf = (field) => fieldTitle(field.name);
export const helpOf = (field) => known(`help.${field.name}`, field.help);

/**
 * Return a field's control with its title, help and a button that resets it: {element, refresh}. place: the beginning
 * of its id, for a second control of a field.
 */
export function control(field, place = "field") {
  const id = `${place}-${field.name}`;
  const { element: input, refresh } = CONTROLS[field.type](field, id);
  const back = iconButton("again", t("ownValue", { field: titleOf(field) }), () => (give(field, null), show()), {
    class: "icon-only back",
  });
  const label = h("label", { for: id, id: `${id}-name`, title: helpOf(field) }, titleOf(field));
  const hint = h(
    "p",
    { class: "hint", id: `${id}-hint` },
    helpOf(field),
    field.why ? ` (${known(`why.${field.name}`, field.why)})` : "",
  );
  const head = h("div", { class: "field-head" }, label, back);
  const element = h("div", { class: `field ${field.type}`, data: { field: field.name } }, head, input, hint);
  const show = () => {
    refresh();
    back.hidden = !isGiven(field);
  };
  element.addEventListener("input", () => queueMicrotask(() => (back.hidden = !isGiven(field))));
  show();
  return { element, refresh: show };
}

const CONTROLS = { integer: numeric, number: numeric, boolean, choice, text };

function numeric(field, id) {
  const whole = field.type === "integer";
  const step = field.step ?? (whole ? 1 : 0.01);
  const low = NEAR[field.name] ?? field.minimum ?? 0;
  const far = Math.min(reach(field), field.maximum ?? Infinity);
  const entry = h("input", {
    type: "number",
    id,
    min: field.minimum,
    max: Math.min(field.maximum ?? Infinity, Number.MAX_SAFE_INTEGER),
    step: whole ? step : "any",
    inputmode: whole ? "numeric" : "decimal",
    placeholder: field.default === null ? t("random") : "",
    "aria-describedby": `${id}-hint`,
  });
  const slider =
    Number.isFinite(reach(field)) &&
    h("input", { type: "range", min: low, max: far, step, "aria-labelledby": `${id}-name`, tabindex: "-1" });
  const refresh = () => {
    const value = valueOf(field);
    entry.value = value ?? "";
    if (slider) slider.value = value ?? low;
    paint();
  };
  const paint = () => slider && slider.style.setProperty("--part", `${(100 * (slider.value - low)) / (far - low)}%`);
  entry.addEventListener("input", () => {
    if (!entry.checkValidity()) return;
    give(field, entry.value === "" ? null : Number(entry.value));
    if (slider && entry.value !== "") slider.value = entry.value;
    paint();
  });
  entry.addEventListener("change", refresh); // drops an invalid value; an empty box shows the model's default
  if (slider) {
    slider.addEventListener("input", () => {
      entry.value = slider.value;
      give(field, Number(slider.value));
      paint();
    });
  }
  return { element: h("div", { class: slider ? "pair" : "single" }, slider, entry), refresh };
}

/** Return the end of a field's slider, or Infinity if the field has no slider. */
function reach(field) {
  if (field.name === "steps") return Math.max(12, 3 * (field.default ?? 10));
  if (field.name in FAR) return FAR[field.name];
  return field.maximum !== null && field.maximum <= 10 ? field.maximum : Infinity;
}

function boolean(field, id) {
  const box = h("input", { type: "checkbox", role: "switch", id, class: "switch", "aria-describedby": `${id}-hint` });
  box.addEventListener("change", () => give(field, box.checked));
  return { element: box, refresh: () => (box.checked = Boolean(valueOf(field))) };
}

function choice(field, id) {
  const options = field.choices.map((word) =>
    h("option", { value: word }, known(`choice.${word}`, word.replaceAll("_", " "))),
  );
  const select = h("select", { id, "aria-describedby": `${id}-hint` }, options);
  select.addEventListener("change", () => give(field, select.value));
  return { element: select, refresh: () => (select.value = valueOf(field) ?? field.choices[0]) };
}

function text(field, id) {
  const area = h("textarea", { id, rows: 2, "aria-describedby": `${id}-hint` });
  area.addEventListener("input", () => give(field, area.value === "" ? null : area.value));
  return { element: area, refresh: () => (area.value = valueOf(field) ?? "") };
}
