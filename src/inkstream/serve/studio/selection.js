// Pictures that are picked in the gallery, and the actions on all of them.

import { hear, say } from "./bus.js";
import { openCompare } from "./compare.js";
import { byId, h, icon, iconButton } from "./dom.js";
import { deletePictures, markFavourites } from "./marks.js";
import { notice } from "./notice.js";
import { openRefine } from "./refine.js";
import { t } from "./words.js";

const picked = new Map(); // id -> picture, in the order they were picked

export const isPicked = (id) => picked.has(id);
export const pickedCount = () => picked.size;

/** Pick a picture, or unpick it. */
export function toggle(picture) {
  if (!picked.delete(picture.id)) picked.set(picture.id, picture);
  say("picked");
}

/** Unpick all pictures. */
export function clearPicked() {
  picked.clear();
  say("picked");
}

/** Pick a picture for a comparison. The comparison opens once two pictures are picked. */
export function compareWith(picture) {
  if (!picked.has(picture.id)) picked.set(picture.id, picture);
  say("picked");
  if (picked.size === 2) openCompare(...picked.values());
  else notice(t("pickSecond"));
}

/** Return the bar at the foot of the gallery. It is visible while pictures are picked. */
export function selectionBar() {
  const text = h("p", { role: "status" });
  const compare = h(
    "button",
    { type: "button", onclick: () => openCompare(...picked.values()) },
    icon("compare"),
    t("compare"),
  );
  const bar = h(
    "div",
    { class: "selection", role: "toolbar", "aria-label": t("selection") },
    text,
    compare,
    h("button", { type: "button", onclick: () => openRefine([...picked.values()]) }, icon("spark"), t("refine")),
    iconButton("star", t("favourite"), () => markFavourites([...picked.values()])),
    iconButton("trash", t("delete"), () => deletePictures([...picked.values()]).then(clearPicked)),
    iconButton("close", t("selectNone"), clearPicked),
  );
  const show = () => {
    bar.hidden = picked.size === 0;
    text.textContent = t("pickedCount", { n: picked.size });
    compare.disabled = picked.size !== 2;
    byId("gallery").classList.toggle("picking", picked.size > 0);
  };
  hear("picked", show);
  show();
  return bar;
}
