// X/Y grids: one job whose pictures differ in one or two fields.

import { byId, h } from "./dom.js";
import { titleOf } from "./fields.js";
import { models, shown } from "./models.js";
import { giveGrid, grid, PICTURES } from "./wish.js";
import { known, t } from "./words.js";

/** Return the values of a field in a text. Values of text fields are lines; others are separated by commas. */
export function parse(text, field) {
  const parts = text
    .split(field.type === "text" ? /\n/ : /[,，、\s]+/)
    .map((part) => part.trim())
    .filter(Boolean);
  if (field.type === "integer" || field.type === "number") return parts.map(Number).filter(Number.isFinite);
  return field.type === "boolean" ? parts.map((part) => part === "true") : parts;
}

/** Return the fields that a grid can vary, by name. */
function axes(form) {
  const model = { name: "model", title: t("model"), type: "choice", choices: models().map((one) => one.id) };
  const fields = shown(form).filter((field) => !["count", "loras"].includes(field.name) && !PICTURES.includes(field.name));
  return new Map([...fields, ...(models().length > 1 ? [model] : [])].map((field) => [field.name, field]));
}

/** Return the grid for the server, with fields that the model takes, or null. */
export function gridOf(form) {
  const fields = axes(form);
  const { x = null, y = null } = grid() ?? {};
  const [first, second] = [x, y].filter((axis) => axis && fields.has(axis.field) && axis.values.length);
  return first ? { x: first, ...(second ? { y: second } : {}) } : null;
}

/** Return the control of the grid: {element, refresh}. */
export function gridControl(form) {
  const fields = axes(form);
  const body = h("div", { class: "axes" });
  const total = h("p", { class: "quiet", role: "status" });
  const count = () => {
    const made = grid();
    total.textContent = made ? t("gridCount", { n: made.x.values.length * (made.y?.values.length ?? 1) }) : "";
  };
  const refresh = () => {
    const now = grid();
    body.replaceChildren(axis("x", fields, now, refresh, count), now?.x ? axis("y", fields, now, refresh, count) : "");
    count();
  };
  refresh();
  return { element: h("div", { class: "field grid-field", data: { field: "grid" } }, body, total), refresh };
}

function axis(side, fields, now, redraw, count) {
  const id = `grid-${side}`;
  const own = now?.[side] ?? null;
  const select = h(
    "select",
    { id, "aria-label": t(side === "x" ? "columns" : "rows") },
    h("option", { value: "" }, t(side === "x" ? "columnsNone" : "rowsNone")),
    [...fields.values()].map((field) => h("option", { value: field.name }, titleOf(field))),
  );
  select.value = own && fields.has(own.field) ? own.field : "";
  const set = (made) => giveGrid(side === "x" ? made && { x: made, y: grid()?.y ?? null } : { x: grid().x, y: made });
  select.addEventListener("change", () => {
    set(select.value ? { field: select.value, values: suggest(fields.get(select.value)) } : null);
    redraw();
    byId(id).focus();
  });
  const field = own && fields.get(own.field);
  return h(
    "div",
    { class: "axis" },
    h("span", { class: "axis-name", "aria-hidden": "true" }, side.toUpperCase()),
    select,
    field && values(field, own, count),
  );
}

/** Return the boxes of an axis' values. Typing stores the values without rebuilding the boxes. */
function values(field, own, count) {
  const note = (made) => {
    own.values = made;
    giveGrid(grid());
    count();
  };
  const words = field.choices ?? (field.type === "boolean" ? ["false", "true"] : null);
  if (words) {
    const boxes = words.map((word) => {
      const box = h("input", { type: "checkbox", value: word, checked: own.values.map(String).includes(word) });
      box.addEventListener("change", () =>
        note(
          parse(
            boxes
              .filter((one) => one.box.checked)
              .map((one) => one.box.value)
              .join(","),
            field,
          ),
        ),
      );
      return { box, element: h("label", { class: "pick" }, box, known(`choice.${word}`, word.replaceAll("_", " "))) };
    });
    return h(
      "div",
      { class: "picks", role: "group", "aria-label": t("values") },
      boxes.map((one) => one.element),
    );
  }
  const label = { "aria-label": t("values"), title: t(field.type === "text" ? "valuesLines" : "valuesCommas") };
  const several = field.type === "text";
  const entry = several
    ? h("textarea", { rows: 3, ...label })
    : h("input", { type: "text", inputmode: "text", ...label });
  entry.value = own.values.join(several ? "\n" : ", ");
  entry.addEventListener("input", () => note(parse(entry.value, field)));
  return entry;
}

/** Return example values of a field. */
function suggest(field) {
  if (field.type === "boolean") return [false, true];
  if (field.choices) return field.choices.slice(0, 3);
  if (field.name === "seed") return [1, 2, 3];
  if (field.type === "text") return [field.default ?? ""].filter(Boolean);
  const middle = field.default ?? field.minimum ?? 1;
  const around = [middle / 2, middle, middle * 1.5].map((value) =>
    field.type === "integer" ? Math.round(value) : Number(value.toFixed(2)),
  );
  const unit = field.step && field.type === "integer" ? field.step : null;
  return [...new Set(around.map((value) => (unit ? Math.max(unit, Math.round(value / unit) * unit) : value)))];
}
