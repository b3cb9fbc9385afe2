// Regions of a request: boxes of the picture with texts of their own, drawn on a page of the picture's shape.

import { h, icon, iconButton } from "./dom.js";
import { notice, speak } from "./notice.js";
import { addressOf } from "./pictures.js";
import { give, valueOf } from "./wish.js";
import { t } from "./words.js";

const MOST = 16;
const LEAST = 28; // pixels of the page along a side of a box
const STEP = 1 / 32; // of the picture, by which the arrow keys move a box
const NUMBER = "(\\d+(?:\\.\\d+)?|\\.\\d+)";
const TEXT = new RegExp(`^${NUMBER},${NUMBER},${NUMBER}x${NUMBER}(?:\\*${NUMBER})?:([^]*)$`);

/** Return the parts of a region X,Y,WxH[*STRENGTH]:TEXT. The box is in shares of the picture. */
export function readRegion(text, { width, height }) {
  const [, x, y, wide, high, strength = 1, words] = TEXT.exec(text) ?? [null, 0, 0, 1, 1, 1, text];
  const box = [x, y, wide, high].map(Number);
  const unit = Math.max(...box) > 1 ? [width, height, width, height] : [1, 1, 1, 1];
  const [left, top, across, down] = box.map((number, i) => number / unit[i]);
  return { left, top, right: left + across, bottom: top + down, strength: Number(strength), text: words };
}

/** Return the text of a region. */
export function writeRegion({ left, top, right, bottom, strength, text }) {
  const [x, y, across, down] = [left, top, right - left, bottom - top].map((share) => Number(share.toFixed(4)));
  return `${x},${y},${across}x${down}${strength === 1 ? "" : `*${strength}`}:${text}`;
}

/** Return the control of the regions: {element, refresh}. */
export function regionsControl(form) {
  const field = form.get("regions");
  const page = h("div", { class: "regions-page", role: "group", "aria-label": t("regionsPage") });
  const list = h("ol", { class: "regions", "aria-label": t("field.regions") });
  const button = h(
    "button",
    { type: "button", class: "small", id: "add-region", onclick: () => add({ left: 0.25, top: 0.25, right: 0.75, bottom: 0.75 }) },
    icon("plus"),
    t("addRegion"),
  );
  const element = h(
    "div",
    { class: "field regions-field", data: { field: "regions" } },
    h("div", { class: "field-head" }, h("span", { class: "name" }, t("field.regions")), button),
    page,
    list,
    h("p", { class: "hint" }, t("help.regions")),
  );
  const size = () => ({ width: valueOf(form.get("width")), height: valueOf(form.get("height")) });
  const all = () => valueOf(field).map((text) => readRegion(text, size()));
  const save = (place, region) => give(field, valueOf(field).with(place, writeRegion(region)));

  function add(box) {
    if (valueOf(field).length >= MOST) return notice(t("tooManyRegions", { n: MOST }), { kind: "error" });
    give(field, [...valueOf(field), writeRegion({ ...box, strength: 1, text: "" })]);
    refresh();
    return list.lastElementChild.querySelector("input").focus();
  }

  function drop(place) {
    give(field, valueOf(field).toSpliced(place, 1));
    refresh();
    speak(t("regionRemoved"));
    button.focus();
  }

  /** Return the box of a region on the page: a button, which arrow keys move, and with Shift resize. */
  function boxOf(region, place) {
    const box = h(
      "button",
      { type: "button", class: "region-box", data: { place } },
      h("span", { class: "region-number" }, place + 1),
      h("span", { class: "region-corner", data: { corner: place } }),
    );
    box.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Delete") drop(place);
      if (!by) return;
      event.preventDefault();
      const now = all()[place];
      save(place, event.shiftKey ? resized(now, by[0] * STEP, by[1] * STEP) : moved(now, by[0] * STEP, by[1] * STEP));
      refresh();
    });
    lay(box, region);
    return box;
  }

  function lay(box, region) {
    for (const [side, share] of [
      ["left", region.left],
      ["top", region.top],
      ["width", region.right - region.left],
      ["height", region.bottom - region.top],
    ])
      box.style[side] = `${100 * share}%`;
    box.style.setProperty("--hue", String((Number(box.dataset.place) * 67) % 360));
    const [x, y, w, v] = [region.left, region.top, region.right - region.left, region.bottom - region.top];
    const numbers = { n: Number(box.dataset.place) + 1, x: percent(x), y: percent(y), w: percent(w), h: percent(v) };
    box.setAttribute("aria-label", t("regionBox", numbers));
  }

  /** Return the text of a region, its strength and a button that removes it. */
  function row(region, place) {
    const n = place + 1;
    const words = h("input", { type: "text", value: region.text, "aria-label": t("regionText", { n }), placeholder: t("regionHere") });
    const strength = h("input", {
      type: "number", min: 0, max: 10, step: "any", inputmode: "decimal", value: region.strength,
      "aria-label": t("regionStrength", { n }), title: t("strength"),
    });
    words.addEventListener("input", () => save(place, { ...all()[place], text: words.value }));
    strength.addEventListener("input", () => {
      if (strength.value !== "" && strength.checkValidity())
        save(place, { ...all()[place], strength: Number(strength.value) });
    });
    strength.addEventListener("change", () => (strength.value = all()[place].strength)); // drops an invalid value
    const away = iconButton("close", t("takeAway", { what: t("regionName", { n }) }), () => drop(place));
    return h("li", {}, h("span", { class: "region-number" }, n), words, strength, away);
  }

  // Drawing with a pointer: on free space a new box, on a box a move, on its corner another size

  let held = null; // {from: {x, y}, place, now, change(x, y)}
  const at = (event) => {
    const { left, top, width, height } = page.getBoundingClientRect();
    return { x: inside((event.clientX - left) / width), y: inside((event.clientY - top) / height) };
  };
  const least = () => [LEAST / page.clientWidth, LEAST / page.clientHeight].map((share) => Math.min(share, 1));

  page.addEventListener("pointerdown", (event) => {
    if (event.button || held) return;
    const box = event.target.closest(".region-box");
    const from = at(event);
    if (box) {
      const place = Number(box.dataset.place);
      const start = all()[place];
      const change = event.target.closest("[data-corner]") ? resized : moved;
      held = { place, box, now: start, change: (x, y) => change(start, x - from.x, y - from.y, least()) };
    } else {
      const made = boxOf({ left: from.x, right: from.x, top: from.y, bottom: from.y }, valueOf(field).length);
      page.append(made);
      held = { place: null, box: made, now: null, change: (x, y) => between(from, { x, y }) };
    }
    page.setPointerCapture(event.pointerId);
  });
  page.addEventListener("pointermove", (event) => {
    if (!held) return;
    const { x, y } = at(event);
    held.now = held.change(x, y);
    lay(held.box, held.now);
  });
  const release = (event) => {
    if (!held) return;
    const { place, now, box } = held;
    held = null;
    if (place !== null) {
      if (event.type === "pointerup") save(place, now);
      refresh();
      return;
    }
    box.remove();
    const [across, down] = least();
    if (event.type === "pointerup" && now && now.right - now.left >= across && now.bottom - now.top >= down) add(now);
  };
  page.addEventListener("pointerup", release);
  page.addEventListener("pointercancel", release);

  function refresh() {
    if (held) return;
    const { width, height } = size();
    page.style.aspectRatio = `${width} / ${height}`;
    const regions = all();
    const image = form.has("image") ? valueOf(form.get("image")) : null;
    const focused = page.contains(document.activeElement) ? document.activeElement.dataset.place : null;
    const boxes = regions.map(boxOf);
    page.replaceChildren(...(image ? [h("img", { src: addressOf(image), alt: "" })] : []), ...boxes);
    if (focused !== null) boxes[focused]?.focus();
    if (list.childElementCount !== regions.length || !list.contains(document.activeElement))
      list.replaceChildren(...regions.map(row));
    list.hidden = !regions.length;
  }
  refresh();
  return { element, refresh };
}

const inside = (share) => Math.min(1, Math.max(0, share));
const percent = (share) => Math.round(100 * share);

const between = (a, b) => ({
  left: Math.min(a.x, b.x),
  top: Math.min(a.y, b.y),
  right: Math.max(a.x, b.x),
  bottom: Math.max(a.y, b.y),
});

/** Return a region at another place inside the picture. */
function moved(region, x, y) {
  const across = Math.min(1 - region.right, Math.max(-region.left, x));
  const down = Math.min(1 - region.bottom, Math.max(-region.top, y));
  const { left, top, right, bottom } = region;
  return { ...region, left: left + across, right: right + across, top: top + down, bottom: bottom + down };
}

/** Return a region with its lower right corner elsewhere. */
function resized(region, x, y, [across, down] = [STEP, STEP]) {
  const right = inside(Math.max(region.left + across, region.right + x));
  return { ...region, right, bottom: inside(Math.max(region.top + down, region.bottom + y)) };
}
