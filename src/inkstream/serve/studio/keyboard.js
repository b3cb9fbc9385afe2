// Keyboard shortcuts of the whole page, and the list of all shortcuts.

import { openDialog } from "./dialog.js";
import { byId, h } from "./dom.js";
import { draw } from "./draw.js";
import { clearPicked, pickedCount } from "./selection.js";
import { view } from "./views.js";
import { t } from "./words.js";

const KEYS = [
  ["Ctrl Enter", "keyDraw"],
  ["/", "keySearch"],
  ["Alt ↑ ↓", "keyHistory"],
  ["← → ↑ ↓", "keyWalk"],
  ["Enter", "keyOpen"],
  ["Space", "keyPick"],
  ["F", "keyFavourite"],
  ["Delete", "keyDelete"],
  ["Esc", "keyEscape"],
  ["?", "keyHelp"],
];

/** Start to handle the shortcuts. */
export function setUpKeyboard() {
  addEventListener("keydown", (event) => {
    const open = document.querySelector("dialog[open]");
    const typing = event.target.matches?.("textarea, select, input:not([type=range], [type=checkbox], [type=radio])");
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !open) act(event, event.repeat ? () => {} : drawTyped);
    else if (event.key === "Escape" && !open && pickedCount()) act(event, clearPicked);
    else if (typing || open || event.ctrlKey || event.metaKey || event.altKey) return;
    else if (event.key === "/") act(event, search);
    else if (event.key === "?") act(event, help);
  });
}

function act(event, does) {
  event.preventDefault();
  does();
}

/** Draw with the value that is being typed. A number box stores its value when it loses the focus. */
function drawTyped() {
  const at = document.activeElement;
  at.blur();
  at.focus({ preventScroll: true });
  draw();
}

function search() {
  view("gallery", { onlyNarrow: true });
  byId("search").focus();
  byId("search").select();
}

/** Open the list of shortcuts. */
export function help() {
  openDialog(
    "keys",
    t("keys"),
    h(
      "dl",
      { class: "facts" },
      KEYS.map(([keys, name]) => [
        h(
          "dt",
          {},
          keys.split(" ").map((key) => [h("kbd", {}, key), " "]),
        ),
        h("dd", {}, t(name)),
      ]),
    ),
  );
}
