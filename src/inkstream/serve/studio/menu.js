// A button that opens a short list. Escape, a click elsewhere or a choice closes the list.

import { h, icon } from "./dom.js";

let count = 0;

/**
 * Return a button with its list. items(): the entries when the list opens, { label, icon, run } or elements. empty: the
 * text of a list without entries.
 */
export function menu(button, items, empty = "") {
  const id = `menu-${(count += 1)}`;
  const list = h("div", { id, class: "menu", popover: "auto" });
  button.setAttribute("popovertarget", id);
  list.addEventListener("beforetoggle", (event) => {
    if (event.newState === "open") list.replaceChildren(...fill(items(), list, empty));
  });
  list.addEventListener("toggle", (event) => {
    if (event.newState !== "open") return;
    place(list, button);
    list.querySelector("button, input, a")?.focus();
  });
  list.addEventListener("keydown", (event) => step(event, list));
  new ResizeObserver(() => list.matches(":popover-open") && place(list, button)).observe(list); // entries may come later
  return h("div", { class: "menu-holder" }, button, list);
}

function fill(items, list, empty) {
  if (!items.length) return [h("p", { class: "quiet" }, empty)];
  return items.map((item) => {
    if (item instanceof Element) return item;
    const run = () => {
      list.hidePopover();
      item.run();
    };
    return h("button", { type: "button", onclick: run }, item.icon && icon(item.icon), item.label);
  });
}

/** Place a list under its button, or above it if there is more room, within the window. */
function place(list, button) {
  const from = button.getBoundingClientRect();
  const room = innerHeight - from.bottom;
  const below = room > list.offsetHeight + 12 || room > from.top;
  const top = below ? Math.min(from.bottom + 4, innerHeight - list.offsetHeight - 8) : from.top - list.offsetHeight - 4;
  list.style.top = `${Math.max(8, top)}px`;
  list.style.left = `${Math.max(8, Math.min(from.left, innerWidth - list.offsetWidth - 8))}px`;
}

function step(event, list) {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!by || event.target instanceof HTMLInputElement) return;
  event.preventDefault();
  const all = [...list.querySelectorAll("button")];
  all[(all.indexOf(document.activeElement) + by + all.length) % all.length]?.focus();
}
