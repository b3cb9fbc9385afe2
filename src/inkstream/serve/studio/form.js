// The form. It is built from the chosen model's schema and shows only fields that the model takes.

import { hear } from "./bus.js";
import { canvasButton } from "./canvas.js";
import { copyMenu } from "./copy.js";
import { byId, h, icon, iconButton } from "./dom.js";
import { draft, draw } from "./draw.js";
import { control } from "./fields.js";
import { loadLoras, lorasControl } from "./loras.js";
import { mapButton } from "./maps.js";
import { keep, recollect } from "./memory.js";
import { modelOf, models, shown } from "./models.js";
import { complain, guarded } from "./notice.js";
import { netsControl } from "./nets.js";
import { slots } from "./pictures.js";
import { promptControl } from "./prompt.js";
import { openPicture } from "./recall.js";
import { regionsControl } from "./regions.js";
import { shapeControl } from "./shape.js";
import { upscalersControl } from "./upscalers.js";
import { chooseModel, chosenModel, give, isGiven, matters, openForm, PICTURES, request } from "./wish.js";
import { known, t } from "./words.js";
import { gridControl, gridOf } from "./xy.js";

/** Fields that are always visible. The others are in sections. */
const OPEN = ["prompt", "loras", "upsample", "width", "height", "count", "seed", "steps", "guidance"];
const SECTIONS = [
  ["negative", (field) => field.name === "negative_prompt"],
  ["control", (field) => field.name === "control"],
  ["regions", (field) => field.name === "regions"],
  ["pictures", (field) => field.group === "pictures"],
  ["finer", () => true],
];

/** Control -> fields whose changes it also shows. */
const FOLLOWS = {
  size: ["width", "height"],
  upsample: ["image"],
  loras: ["prompt"],
  control: ["control_nets"],
  regions: ["width", "height", "image"],
};

/** Fields with a control of their own kind. */
const SPECIAL = {
  prompt: (field, form) => promptControl(field, form),
  control: (field, form) => netsControl(form),
  regions: (field, form) => regionsControl(form),
  upscaler: (field) => upscalersControl(field),
};

let form = null; // of the chosen model, by field
let controls = new Map();

/** Show the form of the chosen model. If that model is not offered, the first model becomes the chosen one. */
export async function showForm() {
  if (!modelOf(chosenModel())) chooseModel(models()[0].id);
  form = await openForm();
  await loadLoras(); // now the server knows what fits the model
  controls = new Map();
  const rest = shown(form).filter((field) => !OPEN.includes(field.name));
  const sections = SECTIONS.map(([name, holds]) => {
    const own = rest.filter((field) => holds(field));
    for (const field of own) rest.splice(rest.indexOf(field), 1);
    return own.length
      ? section(
          name,
          own.map((field) => add(field.name, field)),
        )
      : null;
  });
  byId("draw").replaceChildren(
    h("form", { class: "fields", novalidate: true, onsubmit: (event) => (event.preventDefault(), draw()) }, [
      modelChooser(),
      add("prompt"),
      add("loras", null, () => lorasControl(form.get("loras"))),
      form.get("upsample")?.effect === "honours" && add("upsample"),
      sections[0],
      add("size", null, () => shapeControl(form.get("width"), form.get("height"))),
      h("div", { class: "two" }, add("count"), add("seed")),
      add("steps"),
      form.get("guidance")?.effect === "honours" && add("guidance"),
      sections.slice(1),
      section("grid", [add("grid", null, () => gridControl(form))]),
    ]),
    actions(),
  );
  show();
}

function add(name, field = form.get(name), make = null) {
  const own = SPECIAL[name] ?? (PICTURES.includes(name) ? (one) => slots(one, toolsOf(name)) : (one) => control(one));
  const made = make ? make() : own(field, form);
  controls.set(name, made);
  return made.element;
}

/** Return the buttons beside a filled slot of a field. */
function toolsOf(name) {
  if (name === "image") return [canvasButton(form)];
  const follows = modelOf(chosenModel()).inkstream.abilities.includes("map"); // its only reference is a map
  if (name !== "reference" || !follows) return [];
  return [(field, upload) => mapButton(form, upload, (made) => give(field, [made]))];
}

/** Show changed values, hide fields that have no effect, and mark sections that hold given values. */
function show(changed = "all") {
  for (const [name, made] of controls) {
    if (form.has(name)) made.element.hidden = !matters(form, name);
    const concerned = changed === "all" || changed === name || FOLLOWS[name]?.includes(changed);
    if (concerned && !(changed !== "all" && made.element.contains(document.activeElement) && isTyping()))
      made.refresh();
  }
  for (const details of byId("draw").querySelectorAll("details")) {
    const fields = [...details.querySelectorAll("[data-field]")].map((element) => form.get(element.dataset.field));
    const given = fields.some((field) => field && isGiven(field) && matters(form, field.name));
    details.classList.toggle("given", given || (details.dataset.section === "grid" && gridOf(form) !== null));
  }
}

const isTyping = () => document.activeElement.matches("input, textarea") && document.activeElement.type !== "radio";

function section(name, elements) {
  const details = h(
    "details",
    { class: "section", data: { section: name } },
    h("summary", {}, t(`section.${name}`)),
    h("div", { class: "section-body" }, elements),
  );
  details.open = recollect(`open.${name}`, false);
  details.addEventListener("toggle", () => keep(`open.${name}`, details.open));
  return details;
}

function modelChooser() {
  const select = h(
    "select",
    { id: "model" },
    models().map((model) => h("option", { value: model.id }, model.id)),
  );
  select.value = chosenModel();
  select.addEventListener(
    "change",
    guarded(async () => {
      chooseModel(select.value);
      await showForm();
      byId("model").focus();
    }),
  );
  const { title, licence, commercial } = modelOf(chosenModel()).inkstream;
  const about = h("p", { class: "about", title }, known(`model.${chosenModel()}`, title));
  const terms =
    licence === "unknown"
      ? null
      : h("span", { class: "badge", title: t(commercial ? "commercialYes" : "commercialNo") }, licence);
  const tools = h("div", { class: "row" }, terms, explainer(), iconButton("recall", t("openPicture"), openPicture));
  return h(
    "div",
    { class: "field", data: { field: "model" } },
    h("div", { class: "field-head" }, h("label", { for: "model" }, t("model")), tools),
    select,
    about,
  );
}

/** Return a button that shows or hides the explanations of all options. */
function explainer() {
  const button = iconButton("help", t("explain"), () => {
    const on = document.body.classList.toggle("explain");
    button.setAttribute("aria-pressed", String(on));
    keep("explain", on || null);
  });
  document.body.classList.toggle("explain", Boolean(recollect("explain")));
  button.setAttribute("aria-pressed", String(Boolean(recollect("explain"))));
  return button;
}

function actions() {
  return h(
    "div",
    { class: "actions" },
    h(
      "button",
      { type: "button", id: "draw-now", class: "primary", onclick: () => draw(), title: "Ctrl+Enter" },
      icon("draw"),
      t("drawNow"),
    ),
    h("button", { type: "button", id: "draft-now", onclick: () => draft(), title: t("draftHelp") }, t("draft")),
    copyMenu(() => request(form)),
  );
}

hear("wish", (name) => {
  if (form && name !== "model") show(name);
});
hear("recalled", () => showForm().catch(complain));
