// The prompt, and the history of prompts: a list to choose from, or Alt with the arrow keys.

import { h, icon } from "./dom.js";
import { titleOf } from "./fields.js";
import { keep, recollect } from "./memory.js";
import { menu } from "./menu.js";
import { toldHint } from "./told.js";
import { give, valueOf } from "./wish.js";
import { t } from "./words.js";

const MOST = 200;

/** Return the prompts that were drawn, newest first. */
export const history = () => recollect("prompts", []);

/** Add a prompt to the history. */
export function remember(prompt) {
  const text = prompt.trim();
  if (text) keep("prompts", [text, ...history().filter((one) => one !== text)].slice(0, MOST));
}

/** Return the control of the prompt for a model's form: {element, refresh}. */
export function promptControl(field, form) {
  const area = h("textarea", {
    id: "prompt",
    rows: 4,
    placeholder: t("promptHere"),
    "aria-keyshortcuts": "Control+Enter",
    "aria-describedby": "told",
  });
  const refresh = () => {
    if (area.value !== valueOf(field)) area.value = valueOf(field);
  };
  area.addEventListener("input", () => {
    place = -1;
    give(field, area.value);
  });
  let place = -1; // index in the history; -1: the prompt that is being written
  let written = "";
  area.addEventListener("keydown", (event) => {
    const by = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!event.altKey || !by) return;
    event.preventDefault();
    const all = history();
    if (place === -1) written = area.value;
    place = Math.max(-1, Math.min(all.length - 1, place + by));
    give(field, place === -1 ? written : all[place]);
    refresh();
  });
  const button = h(
    "button",
    { type: "button", class: "icon-only", "aria-label": t("history"), title: `${t("history")} (Alt ↑ ↓)` },
    icon("history"),
  );
  const head = h(
    "div",
    { class: "field-head" },
    h("label", { for: "prompt" }, titleOf(field)),
    menu(button, () => chooser(field), t("noHistory")),
  );
  refresh();
  const hint = toldHint(form);
  return { element: h("div", { class: "field prompt", data: { field: "prompt" } }, head, area, hint), refresh };
}

/** Return the past prompts as buttons, and a box that filters them. */
function chooser(field) {
  const all = history();
  if (!all.length) return [];
  const buttons = all.map((prompt) =>
    h(
      "button",
      {
        type: "button",
        class: "past",
        onclick: (event) => (event.currentTarget.closest("[popover]").hidePopover(), give(field, prompt)),
      },
      prompt,
    ),
  );
  const search = h("input", { type: "search", "aria-label": t("searchHistory"), placeholder: t("searchHistory") });
  search.addEventListener("input", () => {
    const wanted = search.value.toLocaleLowerCase();
    for (const button of buttons) button.hidden = !button.textContent.toLocaleLowerCase().includes(wanted);
  });
  return [search, ...buttons];
}
