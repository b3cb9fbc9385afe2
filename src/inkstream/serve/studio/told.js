// The hint below the prompt: the expanded prompt that the model gets, and the parts that it does not understand.

import { post } from "./api.js";
import { hear } from "./bus.js";
import { h } from "./dom.js";
import { chosenModel, valueOf } from "./wish.js";
import { t } from "./words.js";

const PAUSE = 400; // milliseconds after the last key
const DECIDES = ["prompt", "negative_prompt", "seed", "upsample", "loras"];
const HEARD = new Set([...DECIDES, "image", "all"]);

/** Patterns of the server's notes, and the names of their translations. Other notes are shown unchanged. */
const NOTES = [
  [/; the prompt names none of them$/, "note.nothing"],
  [/; it cannot draw: (?<words>.+)$/, "note.unknown"],
  [/at most (?<most>\d+) things, not (?<count>\d+): the others are left out$/, "note.many"],
  [/^the prompt asks for (?<name>.+) and also excludes it: it is drawn$/, "note.both"],
  [/^pocket writes one text: (?<texts>.+) is left out$/, "note.texts"],
  [/^pocket writes at most (?<most>\d+) characters, (?<text>.+) has (?<count>\d+)$/, "note.long"],
  [/^pocket cannot write (?<letters>.+)$/, "note.letters"],
  [/^the things do not fit into one picture/, "note.room"],
  [/^for anything else: [^]+ -m (?<model>\S+)$/, "note.instead"],
];

let asked = 0;
let waiting = 0;
let fields = null; // the chosen model's fields by name
const words = h("p", { class: "told-words" });
const notes = h("ul", { class: "told-notes", "aria-live": "polite" });

/** Return the hint for a model's form. */
export function toldHint(form) {
  fields = form;
  clear();
  ask();
  return h("div", { id: "told" }, words, notes);
}

function clear() {
  asked += 1;
  words.replaceChildren();
  notes.replaceChildren();
}

/** Ask the server for the expanded prompt, if the model expands prompts. An outdated answer is not shown. */
async function ask() {
  clearTimeout(waiting);
  const body = { model: chosenModel() };
  for (const name of DECIDES) if (fields.has(name)) body[name] = valueOf(fields.get(name));
  if (!body.upsample || !fields.get("upsample").default || !body.prompt.trim()) {
    clear();
    return;
  }
  const own = ++asked;
  try {
    const answer = await post("/v1/prompts", body);
    if (own === asked) show(body, answer);
  } catch {
    if (own === asked) clear(); // drawing shows the error
  }
}

function show(body, { told, notes: lines }) {
  const lead = t(body.seed === null ? "toldPerhaps" : "told");
  words.replaceChildren(...(told === body.prompt ? [] : [h("span", {}, lead), " ", told]));
  notes.replaceChildren(...lines.map((line) => h("li", {}, noteOf(line))));
}

/** Return a note in the user's language. */
function noteOf(line) {
  for (const [pattern, name] of NOTES) {
    const match = pattern.exec(line);
    if (match) return t(name, match.groups);
  }
  return line;
}

hear("wish", (name) => {
  if (!fields || !HEARD.has(name)) return;
  clearTimeout(waiting);
  waiting = setTimeout(ask, PAUSE);
});
