// The gallery's search: words, model, seed, days, favourites and deleted pictures.

import { h, icon } from "./dom.js";
import { models } from "./models.js";
import { t } from "./words.js";

const DAY = 86_400;

/** Return the beginning of a day of a date box in Unix seconds, in the local time zone. */
const beginning = (day) => (day ? new Date(`${day}T00:00`).getTime() / 1000 : null);

/** Return the controls of the search. changed(query) is called after each change; clear() clears the search. */
export function searchBar(changed) {
  const words = h("input", {
    type: "search",
    id: "search",
    placeholder: t("searchHere"),
    "aria-label": t("searchHere"),
    "aria-keyshortcuts": "/",
    enterkeyhint: "search",
  });
  const model = h(
    "select",
    { id: "search-model" },
    h("option", { value: "" }, t("anyModel")),
    models().map(({ id }) => h("option", { value: id }, id)),
  );
  const seed = h("input", { type: "number", id: "search-seed", min: 0, step: 1, inputmode: "numeric" });
  const since = h("input", { type: "date", id: "search-since" });
  const until = h("input", { type: "date", id: "search-until" });
  const favourite = toggle("star", t("favourites"));
  const deleted = toggle("trash", t("deleted"));
  const more = h(
    "button",
    {
      type: "button",
      class: "icon-only",
      "aria-label": t("filters"),
      title: t("filters"),
      "aria-expanded": "false",
      "aria-controls": "filters",
    },
    icon("filter"),
  );
  const labelled = (text, input) => h("div", { class: "field" }, h("label", { for: input.id }, text), input);
  const filters = h(
    "div",
    { id: "filters", class: "filters", hidden: true },
    labelled(t("model"), model),
    labelled(t("field.seed"), seed),
    labelled(t("since"), since),
    labelled(t("until"), until),
    h("button", { type: "button", class: "small", onclick: () => clear() }, t("clearFilters")),
  );
  more.addEventListener("click", () => {
    filters.hidden = !filters.hidden;
    more.setAttribute("aria-expanded", String(!filters.hidden));
  });

  const query = () => ({
    q: words.value.trim(),
    model: model.value,
    seed: seed.value,
    since: beginning(since.value),
    until: until.value ? beginning(until.value) + DAY : null,
    favourite: favourite.getAttribute("aria-pressed") === "true" || null,
    deleted: deleted.getAttribute("aria-pressed") === "true",
  });
  let last = JSON.stringify(query());
  const tell = () => {
    const now = query();
    more.classList.toggle("on", Boolean(now.model || now.seed || now.since || now.until));
    if (JSON.stringify(now) === last) return;
    last = JSON.stringify(now);
    changed(now);
  };
  let due = 0;
  const soon = () => {
    clearTimeout(due);
    due = setTimeout(tell, 180);
  };
  const clear = () => {
    for (const input of [words, model, seed, since, until]) input.value = "";
    for (const button of [favourite, deleted]) button.setAttribute("aria-pressed", "false");
    tell();
  };
  words.addEventListener("input", (event) => event.isComposing || soon());
  words.addEventListener("compositionend", soon);
  for (const input of [seed, model, since, until]) input.addEventListener("input", soon);
  for (const button of [favourite, deleted]) button.addEventListener("click", tell);
  const box = h("div", { class: "search", role: "search" }, icon("search"), words);
  return { element: h("div", { class: "search-row" }, box, favourite, deleted, more), filters, query, clear };
}

/** Return whether a query finds all pictures. */
export const isOpen = (query) => Object.values(query).every((value) => !value);

function toggle(name, label) {
  const button = h(
    "button",
    { type: "button", class: "icon-only toggle", "aria-label": label, title: label, "aria-pressed": "false" },
    icon(name),
  );
  button.addEventListener("click", () =>
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true")),
  );
  return button;
}
