// Control pictures of a request, each with the net that reads it: its strength, and the steps in which it is on.

import { get } from "./api.js";
import { h, icon, iconButton } from "./dom.js";
import { mapButton } from "./maps.js";
import { complain, guarded, notice, speak } from "./notice.js";
import { addressOf, chooseFiles, upload } from "./pictures.js";
import { chosenModel, give, valueOf } from "./wish.js";
import { t } from "./words.js";

const MOST = 4;
const USUAL = 0.75; // strength of a net
const REACH = 1.5; // end of the sliders; the box beside a slider takes up to 10
const NUMBER = "(\\d+(?:\\.\\d+)?|\\.\\d+)";
const USE = new RegExp(`^(.+?)(?::${NUMBER})?(?:@${NUMBER}-${NUMBER})?(?:#([a-z][a-z-]*|\\d+))?$`);

let known = new Map(); // of the server, by name

/** Fetch the server's list of control nets. */
export async function loadNets() {
  known = new Map((await get("/v1/controls")).data.map((net) => [net.name, net]));
}

/** Return the parts of a use NAME[:SCALE][@FROM-UNTIL][#MODE]. */
export function readNet(text) {
  const [, name, scale = USUAL, from = 0, until = 1, mode = ""] = USE.exec(text) ?? [null, text];
  return { name, scale: Number(scale), from: Number(from), until: Number(until), mode };
}

export const writeNet = ({ name, scale, from, until, mode }) =>
  name && `${name}:${scale}${from === 0 && until === 1 ? "" : `@${from}-${until}`}${mode && `#${mode}`}`;

const fits = (net) => !net.error && net.fits[chosenModel()] !== false;

/** Add a control picture to a form, with the first net that fits the chosen model. name: that of an upload. */
export function addControl(form, name) {
  const [pictures, nets] = [form.get("control"), form.get("control_nets")];
  if (valueOf(pictures).length >= MOST) return notice(t("tooManyPictures", { n: MOST }), { kind: "error" });
  const net = [...known.values()].find(fits);
  const use = { name: net?.name ?? "", scale: USUAL, from: 0, until: 1, mode: net?.modes[0] ?? "" };
  give(nets, [...valueOf(nets), writeNet(use)]);
  return give(pictures, [...valueOf(pictures), name]);
}

/** Return the control of the control pictures: {element, refresh}. */
export function netsControl(form) {
  const [pictures, nets] = [form.get("control"), form.get("control_nets")];
  const list = h("ul", { class: "nets", "aria-label": t("field.control") });
  const add = guarded(async (files) => {
    for (const file of files.slice(0, MOST)) addControl(form, await upload(file));
    list.lastElementChild?.querySelector("select")?.focus();
  });
  const button = h(
    "button",
    { type: "button", class: "small", id: "add-control", onclick: () => chooseFiles(true, add) },
    icon("plus"),
    t("addControl"),
  );
  const note = h("p", { class: "quiet", role: "status" });
  const element = h(
    "div",
    { class: "field nets-field", data: { field: "control" } },
    h("div", { class: "field-head" }, h("span", { class: "name" }, t("field.control")), button),
    list,
    note,
    h("p", { class: "hint" }, t("help.control")),
  );
  const change = (place, picture, use) => {
    if (picture) give(pictures, valueOf(pictures).with(place, picture));
    if (use) give(nets, valueOf(nets).with(place, use));
  };
  const drop = (place) => {
    give(nets, valueOf(nets).toSpliced(place, 1));
    give(pictures, valueOf(pictures).toSpliced(place, 1));
    speak(t("controlRemoved"));
    button.focus();
  };
  let shown = "";
  const refresh = () => {
    const now = JSON.stringify([valueOf(pictures), valueOf(nets).map((use) => readNet(use).name), [...known.keys()]]);
    if (now === shown) return; // the boxes show what is being typed
    shown = now;
    list.replaceChildren(
      ...valueOf(pictures).map((name, place) =>
        unit(form, name, place, readNet(valueOf(nets)[place] ?? ""), change, drop),
      ),
    );
    list.hidden = !list.childElementCount;
    note.textContent = known.size ? "" : t("noNets");
    note.hidden = Boolean(known.size);
  };
  refresh();
  loadNets().then(refresh, complain);
  return { element, refresh };
}

/** Return one control picture with its net. */
function unit(form, name, place, use, change, drop) {
  const label = t("controlPicture", { n: place + 1 });
  const save = (changes) => change(place, null, writeNet(Object.assign(use, changes)));
  const image = h("img", { src: addressOf(name), alt: label });
  image.addEventListener("error", () => drop(place)); // the server has deleted it
  const figure = h(
    "figure",
    { class: "slot" },
    image,
    h("figcaption", {}, label),
    iconButton("close", t("takeAway", { what: label }), () => drop(place)),
  );
  const map = mapButton(form, name, (made) => change(place, made, null));
  const net = known.get(use.name);
  const problem = !use.name ? "" : !net ? t("netMissing") : (net.error ?? (fits(net) ? "" : t("loraMisfit", { model: chosenModel() })));
  return h(
    "li",
    { class: "net" },
    figure,
    h("div", { class: "net-choices" }, nets(use, label, save), net?.modes.length > 0 && modes(net, use, label, save), map),
    strength(use, label, save),
    steps(use, label, save),
    problem && h("p", { class: "lora-note" }, problem),
  );
}

/** Return the choice of a net. Those that do not fit the chosen model come last. */
function nets(use, label, save) {
  const all = [...known.values()].filter((net) => !net.error);
  const sorted = [...all.filter(fits), ...all.filter((net) => !fits(net))];
  const option = (net) =>
    h("option", { value: net.name }, fits(net) ? net.name : `${net.name} (${t("netMisfit")})`);
  const missing = known.has(use.name) ? [] : [h("option", { value: use.name }, use.name || t("chooseNet"))];
  const select = h("select", { "aria-label": t("netOf", { what: label }) }, missing, sorted.map(option));
  select.value = use.name;
  select.addEventListener("change", () => save({ name: select.value, mode: known.get(select.value).modes[0] ?? "" }));
  return select;
}

/** Return the choice of what the picture shows, for nets that are told it. */
function modes(net, use, label, save) {
  const select = h(
    "select",
    { "aria-label": t("modeOf", { what: label }) },
    net.modes.map((mode) => h("option", { value: mode }, mode)),
  );
  select.value = net.modes[Number(use.mode)] ?? use.mode;
  select.addEventListener("change", () => save({ mode: select.value }));
  return select;
}

function strength(use, label, save) {
  const named = { "aria-label": t("loraStrength", { name: label }) };
  const slider = h("input", { type: "range", min: 0, max: REACH, step: 0.05, tabindex: "-1", ...named });
  const entry = h("input", { type: "number", min: 0, max: 10, step: "any", inputmode: "decimal", ...named });
  const show = () => {
    if (document.activeElement !== entry) entry.value = use.scale;
    slider.value = use.scale;
    slider.style.setProperty("--part", `${(100 * slider.value) / REACH}%`);
  };
  const take = (from) => {
    if (from.value === "" || !from.checkValidity()) return;
    save({ scale: Number(from.value) });
    show();
  };
  slider.addEventListener("input", () => take(slider));
  entry.addEventListener("input", () => take(entry));
  entry.addEventListener("change", () => (entry.value = use.scale)); // drops an invalid value
  show();
  return h("div", { class: "net-strength" }, h("span", { class: "quiet" }, t("strength")), slider, entry);
}

/** Return the boxes of the steps in which a net is on, in percent. */
function steps(use, label, save) {
  const box = (name, text) => {
    const entry = h("input", { type: "number", min: 0, max: 100, inputmode: "numeric", "aria-label": `${label}: ${text}` });
    const show = () => (entry.value = Math.round(100 * use[name]));
    entry.addEventListener("change", () => {
      const next = { from: use.from, until: use.until, [name]: Number(entry.value) / 100 };
      if (entry.value !== "" && entry.checkValidity() && next.from < next.until) save(next);
      show();
    });
    show();
    return entry;
  };
  return h(
    "div",
    { class: "net-steps" },
    h("span", { class: "quiet" }, t("stepsFrom")),
    box("from", t("stepsFrom")),
    h("span", { class: "quiet" }, t("stepsUntil")),
    box("until", t("stepsUntil")),
    h("span", { class: "quiet" }, "%"),
  );
}
