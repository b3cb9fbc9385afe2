// The LoRAs of a request: a list to choose from, and for each chosen one its strength and its trigger words.

import { get } from "./api.js";
import { h, icon, iconButton } from "./dom.js";
import { menu } from "./menu.js";
import { complain, speak } from "./notice.js";
import { chosenModel, give, presentForm, valueOf } from "./wish.js";
import { t } from "./words.js";

const FEW = 8; // a model with at most so many steps was distilled; a longer list has a search box
const TOGETHER = 1.2; // the sum of strengths that a distilled model bears
const REACH = 2; // ends of the sliders; the box beside a slider takes all strengths
const USE = /^(.+?)(?::([+-]?(?:\d+(?:\.\d+)?|\.\d+)))?((?:@[\d.]+-[\d.]+)?(?:#[^#]+)?)$/;

let known = new Map(); // of the server, by name

/** Fetch the server's list of LoRAs. */
export async function loadLoras() {
  known = new Map((await get("/v1/loras")).data.map((lora) => [lora.name, lora]));
}

/** Return the parts of a use NAME[:STRENGTH][@FROM-UNTIL][#BLOCKS=FACTOR,...]. tail: all behind the strength. */
export function readUse(text) {
  const [, name, strength, tail] = USE.exec(text) ?? [null, text, undefined, ""];
  return { name, strength: strength === undefined ? 1 : Number(strength), tail };
}

const writeUse = ({ name, strength, tail }) => `${name}${strength === 1 ? "" : `:${strength}`}${tail}`;

/** Return a use as text for people. */
export function tellUse(text) {
  const { name, strength, tail } = readUse(text);
  return `${titleOf(name)} × ${strength}${tail && ` ${tail}`}`;
}

const titleOf = (name) => known.get(name)?.title || name;

/** Return the control of the LoRAs: {element, refresh}. */
export function lorasControl(field) {
  const button = h("button", { type: "button", class: "small", id: "add-lora" }, icon("plus"), t("addLora"));
  const list = h("ul", { class: "loras", "aria-label": t("field.loras") });
  const warning = h("p", { class: "lora-note", role: "status" });
  const head = h(
    "div",
    { class: "field-head" },
    h("span", { class: "name", title: t("help.loras") }, t("field.loras")),
    menu(button, () => [chooser(field, () => list)]),
  );
  const element = h(
    "div",
    { class: "field loras-field", data: { field: "loras" } },
    head,
    list,
    warning,
    h("p", { class: "hint" }, t("help.loras")),
  );
  let rows = []; // of the list, in its order

  const set = (uses) => give(field, uses.map(writeUse));
  const warn = (uses) => {
    const sum = uses.reduce((total, { strength }) => total + Math.abs(strength), 0);
    const few = presentForm().get("steps").default <= FEW;
    const text = few && sum > TOGETHER + 1e-9 ? t("lorasTooStrong", { n: TOGETHER, steps: FEW }) : "";
    if (warning.textContent !== text) warning.textContent = text;
  };
  const refresh = () => {
    const uses = valueOf(field).map(readUse);
    const names = uses.map(({ name }) => name).join("\n");
    if (names !== rows.map(({ name }) => name).join("\n")) {
      rows = uses.map(({ name }, index) =>
        chosen(name, {
          change: (strength) => {
            const now = valueOf(field).map(readUse);
            now[index].strength = strength;
            set(now);
            warn(now);
          },
          remove: () => {
            set(valueOf(field).map(readUse).toSpliced(index, 1));
            refresh();
            speak(t("loraRemoved", { name: titleOf(name) }));
            button.focus();
          },
        }),
      );
      list.replaceChildren(...rows.map(({ element: row }) => row));
    }
    rows.forEach((row, index) => row.show(uses[index]));
    list.hidden = !rows.length;
    warn(uses);
  };
  refresh();
  return { element, refresh };
}

/** Return the row of a chosen LoRA: {name, element, show}. */
function chosen(name, { change, remove }) {
  const lora = known.get(name);
  const title = titleOf(name);
  const label = { "aria-label": t("loraStrength", { name: title }) };
  const slider = h("input", { type: "range", min: -REACH, max: REACH, step: 0.05, tabindex: "-1", ...label });
  const entry = h("input", { type: "number", min: -10, max: 10, step: "any", inputmode: "decimal", ...label });
  const paint = () => slider.style.setProperty("--part", `${(100 * (Number(slider.value) + REACH)) / (2 * REACH)}%`);
  let strength = 1;
  slider.addEventListener("input", () => {
    strength = Number(slider.value);
    entry.value = slider.value;
    paint();
    change(strength);
  });
  entry.addEventListener("input", () => {
    if (entry.value === "" || !entry.checkValidity()) return;
    strength = Number(entry.value);
    slider.value = entry.value;
    paint();
    change(strength);
  });
  entry.addEventListener("change", () => (entry.value = strength)); // drops an invalid value
  const chips = (lora?.trigger_words ?? []).map(chip);
  const note = noteOf(lora);
  const element = h(
    "li",
    { class: "lora" },
    face(lora),
    h("span", { class: "lora-title", title: name }, title),
    h("div", { class: "pair" }, slider, entry),
    iconButton("close", t("takeAway", { what: title }), remove),
    chips.length > 0 &&
      h(
        "div",
        { class: "chips", role: "group", "aria-label": t("triggerWords", { name: title }) },
        chips.map(({ element: one }) => one),
      ),
    note && h("p", { class: "lora-note" }, note),
  );
  const show = (use) => {
    strength = use.strength;
    if (document.activeElement !== entry) entry.value = strength;
    slider.value = strength;
    paint();
    for (const one of chips) one.show();
  };
  return { name, element, show };
}

/** Return a trigger word as a button that adds it to the prompt: {element, show}. */
function chip(word) {
  const field = () => presentForm().get("prompt");
  const mark = h("span", { "aria-hidden": "true" });
  const has = () => valueOf(field()).toLocaleLowerCase().includes(word.toLocaleLowerCase());
  const add = () => {
    if (has()) return;
    const prompt = valueOf(field()).replace(/[\s,，]+$/u, "");
    give(field(), prompt ? `${prompt}, ${word}` : word);
    speak(t("triggerAdded", { word }));
  };
  const element = h("button", { type: "button", class: "chip", title: t("triggerHelp"), onclick: add }, mark, word);
  const show = () => {
    mark.replaceChildren(icon(has() ? "check" : "plus"));
    element.setAttribute("aria-pressed", String(has()));
  };
  show();
  return { element, show };
}

/** Return why a LoRA is of no use to the chosen model; empty if it fits, or if this is unknown. */
function noteOf(lora) {
  if (!lora) return t("loraMissing");
  if (lora.error) return lora.error;
  return lora.fits[chosenModel()] === false ? t("loraMisfit", { model: chosenModel() }) : "";
}

const face = (lora) =>
  lora?.preview
    ? h("img", { class: "lora-face", src: lora.preview, alt: "", loading: "lazy" })
    : h("span", { class: "lora-face" }, icon("spark"));

/** Return the server's LoRAs as buttons, and a box that filters them. Those that fit the chosen model come first. */
function chooser(field, listOf) {
  const body = h("div", { class: "lora-choices" });
  const fill = () => {
    const taken = new Set(valueOf(field).map((use) => readUse(use).name));
    const left = [...known.values()].filter(({ name }) => !taken.has(name));
    left.sort((a, b) => Boolean(noteOf(a)) - Boolean(noteOf(b)));
    const choices = left.map((lora) => choice(lora, field, listOf));
    const nothing = h("p", { class: "quiet", role: "status", hidden: choices.length > 0 }, t(known.size ? "noLoraLeft" : "noLoras"));
    if (choices.length <= FEW) return body.replaceChildren(nothing, ...choices.map(({ element }) => element));
    const search = h("input", { type: "search", "aria-label": t("searchLoras"), placeholder: t("searchLoras") });
    search.addEventListener("input", () => {
      const wanted = search.value.toLocaleLowerCase().trim();
      for (const { element, words } of choices) element.hidden = !words.includes(wanted);
      nothing.hidden = choices.some(({ element }) => !element.hidden);
      nothing.textContent = t("noLoraFound");
    });
    return body.replaceChildren(search, nothing, ...choices.map(({ element }) => element));
  };
  fill();
  const before = JSON.stringify([...known]);
  const again = () => {
    if (JSON.stringify([...known]) === before) return; // else files have come or gone
    const focused = body.contains(document.activeElement);
    fill();
    if (focused) body.querySelector("input, button")?.focus();
  };
  loadLoras().then(again, complain);
  return body;
}

function choice(lora, field, listOf) {
  const about = [lora.base, lora.ranks.length > 0 && t("loraRank", { n: lora.ranks.join(", ") })].filter(Boolean).join(" · ");
  const note = noteOf(lora);
  const pick = (event) => {
    event.currentTarget.closest("[popover]").hidePopover();
    give(field, [...valueOf(field), writeUse({ name: lora.name, strength: lora.strength ?? 1, tail: "" })]);
    listOf().lastElementChild?.querySelector("input[type=number]")?.focus();
  };
  const element = h(
    "button",
    { type: "button", class: "lora-choice", disabled: Boolean(lora.error), title: lora.hint || null, onclick: pick },
    face(lora),
    h(
      "span",
      { class: "lora-words" },
      h("span", {}, lora.title),
      about && h("span", { class: "quiet" }, about),
      note && h("span", { class: "lora-note" }, note),
    ),
  );
  return { element, words: [lora.name, lora.title, lora.base, ...lora.trigger_words].join(" ").toLocaleLowerCase() };
}
