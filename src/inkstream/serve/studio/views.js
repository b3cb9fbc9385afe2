// The views of the page. A wide window shows the form beside the stage or the gallery, and the queue. A narrow one shows
// the stage and the form, the queue, or the gallery.

import { byId, h, icon } from "./dom.js";
import { keep, recollect } from "./memory.js";
import { t } from "./words.js";

const VIEWS = ["draw", "queue", "gallery"];
const NARROW = matchMedia("(max-width: 899px)");

/** Show a view. onlyNarrow: do nothing in a wide window. */
export function view(name, { onlyNarrow = false } = {}) {
  if (onlyNarrow && !NARROW.matches) return;
  document.body.dataset.view = name;
  for (const button of byId("views").children) {
    if (button.dataset.view === name) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  keep("view", name);
  dispatchEvent(new Event("resize")); // hidden elements had no size
}

/** Fill the bar of views and show the last view. */
export function setUpViews() {
  byId("views").append(
    ...VIEWS.map((name) =>
      h(
        "button",
        { type: "button", data: { view: name }, onclick: () => view(name) },
        icon(name),
        h("span", {}, t(name)),
        h("span", { class: "count", data: { count: name } }),
      ),
    ),
  );
  view(VIEWS.includes(recollect("view")) ? recollect("view") : "draw");
}

/** Show a number beside a view's name; 0 hides it. */
export function countOf(name, value) {
  byId("views").querySelector(`[data-count="${name}"]`).textContent = value || "";
}
