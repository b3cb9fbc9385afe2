// The gallery of all pictures, newest first. The server searches; arrow keys move the focus.

import { hear } from "./bus.js";
import { byId, h, icon } from "./dom.js";
import { keep, recollect } from "./memory.js";
import { deletePictures, markFavourite, restorePictures } from "./marks.js";
import { complain } from "./notice.js";
import { pictureList } from "./pages.js";
import { scroller } from "./scroller.js";
import { isOpen, searchBar } from "./search.js";
import { selectionBar, toggle } from "./selection.js";
import { tileMaker } from "./tile.js";
import { openViewer } from "./viewer.js";
import { welcome } from "./welcome.js";
import { pictureCount, t } from "./words.js";

let list = null;
let focused = 0;

/** Fill the gallery's section and keep it up to date. */
export function setUpGallery() {
  const section = byId("gallery");
  const search = searchBar((query) => look(query));
  const count = h("p", { class: "quiet count", role: "status" });
  const field = h("div", { class: "tiles", role: "list", "aria-label": t("gallery") });
  const blank = h("div", { class: "blank" });
  const sizes = h("input", {
    type: "range",
    min: 90,
    max: 320,
    step: 10,
    value: recollect("tile", 170),
    "aria-label": t("tileSize"),
    title: t("tileSize"),
    class: "tile-size",
  });
  const head = h(
    "div",
    { class: "gallery-head" },
    h("div", { class: "section-head" }, h("h2", {}, t("gallery")), count, sizes),
    search.element,
    search.filters,
  );
  section.append(head, field, blank, selectionBar());

  const favourite = (id) => markFavourite(id, !list.at(list.indexOf(id))?.favourite).catch(complain);
  const tile = tileMaker(() => list, { open: (index) => openViewer(list, index), favourite, focused: () => focused });
  const source = { size: () => list?.size() ?? 0, need: (from, to) => list?.ensure(from, to).catch(complain) };
  const grid = scroller(section, field, source, tile);

  const changed = () => {
    focused = Math.max(0, Math.min(focused, list.size() - 1));
    grid.refresh();
    count.textContent = list.size() ? pictureCount(list.size()) : "";
    const none = list.isBegun() && !list.size();
    blank.hidden = !none;
    field.hidden = none;
    section.classList.toggle("none", none);
    if (none && !blank.firstChild) blank.append(isOpen(search.query()) ? welcome() : nothingFound(search.clear));
  };
  const look = (query) => {
    list?.end();
    list = pictureList(query, changed);
    focused = 0;
    section.scrollTop = 0;
    blank.replaceChildren();
    grid.refresh();
    list.ensure(0).catch(complain);
  };
  const lookAgain = () => look(search.query());
  sizes.addEventListener("input", () => (grid.resize(Number(sizes.value)), keep("tile", Number(sizes.value))));
  grid.resize(Number(sizes.value));

  const isAtTop = () => section.scrollTop < section.clientHeight; // further down, new pictures do not move the view
  hear("picture", (picture) => {
    if (isOpen(search.query())) list.prepend(picture);
    else if (isAtTop() && !search.query().deleted) lookAgain();
  });
  hear("marked", (picture) => list.update(picture.id, { favourite: picture.favourite }));
  hear("deleted", (id) => {
    const back = list.take(id);
    undo.set(id, back);
  });
  hear("restored", (id) => {
    if (search.query().deleted) list.take(id);
    else undo.get(id)?.();
    undo.delete(id);
  });
  hear("picked", () => grid.refresh());
  hear("back", () => isAtTop() && lookAgain());
  hear("viewed", (id) => {
    const index = list.indexOf(id);
    if (index < 0 || document.querySelector("dialog[open]")) return;
    focused = index;
    grid.reveal(index)?.querySelector(".tile-open").focus({ preventScroll: true });
  });
  addEventListener("resize", () => grid.refresh());
  field.addEventListener("keydown", (event) => walk(event, grid, field));
  field.addEventListener("focusin", (event) => {
    const index = event.target.closest(".tile")?.dataset.index;
    if (index !== undefined && Number(index) !== focused) {
      focused = Number(index);
      grid.refresh();
    }
  });
  look(search.query());
}

const undo = new Map(); // id -> function that puts a deleted picture back at its place

/** Handle keys in the grid: arrows, Home, End and pages move; Space picks, F marks, Delete deletes. */
function walk(event, grid, field) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const rows = Math.max(
    1,
    Math.floor(byId("gallery").clientHeight / (field.firstElementChild?.offsetHeight || 160)) - 1,
  );
  const by = {
    ArrowRight: 1,
    ArrowLeft: -1,
    ArrowDown: grid.columns(),
    ArrowUp: -grid.columns(),
    PageDown: rows * grid.columns(),
    PageUp: -rows * grid.columns(),
    Home: -Infinity,
    End: Infinity,
  }[event.key];
  const item = list.at(focused);
  if (by !== undefined) {
    focused = Math.max(0, Math.min(list.size() - 1, focused + by));
    grid.reveal(focused)?.querySelector(".tile-open").focus({ preventScroll: true });
  } else if (!item || !event.target.matches(".tile-open")) return;
  else if (event.key === " ") toggle(item);
  else if (event.key.toLowerCase() === "f") markFavourite(item.id, !item.favourite).catch(complain);
  else if (event.key === "Delete")
    (item.deleted ? restorePictures : deletePictures)([item]).then(() =>
      grid.reveal(focused)?.querySelector(".tile-open").focus(),
    );
  else return;
  event.preventDefault();
}

/** Return the message of an empty search, with a button that shows all pictures. */
function nothingFound(clear) {
  return h(
    "div",
    { class: "nothing" },
    icon("search"),
    h("p", {}, t("nothingFound")),
    h("button", { type: "button", onclick: clear }, t("showAll")),
  );
}
