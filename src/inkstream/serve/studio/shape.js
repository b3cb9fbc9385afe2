// Width and height: aspect ratios at the area of the model's default size, and number boxes.

import { h, iconButton } from "./dom.js";
import { give, isGiven, valueOf } from "./wish.js";
import { t } from "./words.js";

const SHAPES = [
  [1, 1],
  [4, 3],
  [3, 4],
  [3, 2],
  [2, 3],
  [16, 9],
  [9, 16],
];

/** Return [width, height] of an aspect ratio: about the area of the default size, in multiples of the fields' step. */
export function sides([across, down], width, height) {
  const area = width.default * height.default;
  const unit = width.step ?? 16;
  const round = (value) => Math.max(unit, Math.round(value / unit) * unit);
  return [round(Math.sqrt((area * across) / down)), round(Math.sqrt((area * down) / across))];
}

/** Return the control of width and height: {element, refresh}. */
export function shapeControl(width, height) {
  const w = entry(width, t("field.width"));
  const hgt = entry(height, t("field.height"));
  const swap = iconButton("swap", t("swapSides"), () => {
    const [a, b] = [valueOf(width), valueOf(height)];
    give(width, b);
    give(height, a);
  });
  const choices = SHAPES.map((shape) => {
    const radio = h("input", { type: "radio", name: "shape", value: shape.join(":"), class: "unseen" });
    radio.addEventListener("change", () => set(sides(shape, width, height)));
    const glyph = h("span", { class: "glyph", "aria-hidden": "true" });
    const scale = 15 / Math.max(...shape);
    glyph.style.width = `${shape[0] * scale}px`;
    glyph.style.height = `${shape[1] * scale}px`;
    return {
      shape,
      radio,
      element: h(
        "label",
        { class: "shape", title: shape.join(" : ") },
        radio,
        glyph,
        h("span", { class: "ratio" }, shape.join(":")),
      ),
    };
  });
  const note = h("p", { class: "size-note bad", id: "size-note", role: "status", hidden: true });
  for (const box of [w, hgt]) box.setAttribute("aria-describedby", "size-note");
  const set = ([a, b]) => {
    give(width, a);
    give(height, b);
  };
  const refresh = () => {
    const now = [valueOf(width), valueOf(height)];
    w.value = isGiven(width) ? now[0] : "";
    hgt.value = isGiven(height) ? now[1] : "";
    for (const { shape, radio } of choices)
      radio.checked = sides(shape, width, height).every((side, i) => side === now[i]);
    const wrong = [
      [width, w],
      [height, hgt],
    ].map(([field, box]) => {
      const text = isGiven(field) ? wrongSide(field, valueOf(field)) : "";
      box.setAttribute("aria-invalid", String(Boolean(text)));
      return text;
    });
    note.textContent = wrong.filter(Boolean).join(" ");
    note.hidden = !note.textContent;
  };
  refresh();
  const shapes = h(
    "div",
    { class: "shapes", role: "radiogroup", "aria-label": t("shape") },
    choices.map((one) => one.element),
  );
  const numbers = h("div", { class: "numbers" }, w, h("span", { "aria-hidden": "true" }, "×"), hgt, swap);
  const element = h(
    "div",
    { class: "field", data: { field: "size" } },
    h("div", { class: "field-head" }, h("span", { class: "name" }, t("size")), numbers),
    note,
    shapes,
  );
  return { element, refresh };
}

/** Return what is wrong with a side, or "". The side stays as it was typed. */
function wrongSide(field, value) {
  const { step = 1, minimum = 1, maximum = Infinity } = field;
  if (value >= minimum && value <= maximum && value % step === 0) return "";
  const low = Math.floor(value / step) * step;
  const near = [low, low + step].filter((side) => side >= minimum && side <= maximum);
  if (value % step === 0 || !near.length) near.splice(0, 2, value < minimum ? minimum : maximum);
  return t("wrongSide", { value, step, near: near.join(t("orNear")) });
}

/** Return the box of a side in pixels. An empty box means the start picture's side, or else the model's default. */
function entry(field, label) {
  const box = h("input", {
    type: "number",
    "aria-label": label,
    title: label,
    inputmode: "numeric",
    placeholder: field.default,
    min: field.minimum,
    max: field.maximum,
    step: field.step,
  });
  box.addEventListener("change", () => give(field, box.value === "" ? null : Math.round(Number(box.value))));
  return box;
}
