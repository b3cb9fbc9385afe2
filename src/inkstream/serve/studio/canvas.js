// The canvas: paint the mask of the start picture, and draw its edges outwards.

import { newBoard } from "./board.js";
import { hear } from "./bus.js";
import { openDialog } from "./dialog.js";
import { h, icon, iconButton } from "./dom.js";
import { MOST, readExtend, SIDES, writeExtend } from "./extend.js";
import { control } from "./fields.js";
import { blank, shareOf } from "./mask.js";
import { takes } from "./models.js";
import { complain, speak } from "./notice.js";
import { newPast } from "./past.js";
import { addressOf, upload } from "./pictures.js";
import { give, hold, valueOf } from "./wish.js";
import { t } from "./words.js";

const AREA = 2048 * 2048; // pixels of the largest mask; the server enlarges the mask of a larger picture
const TOOLS = [
  ["brush", "b"],
  ["lasso", "l"],
  ["box", "r"],
  ["extend", "x"],
  ["hand", "h"],
];
/** Fields of the form that the canvas shows beside the picture. */
const FIELDS = ["mask_grow", "mask_blur", "mask_soft", "mask_invert", "mask_fill", "crop"];
const LARGEST = 1024; // pixels of the largest brush

let last = null; // the mask that was painted last, with its past: {image, name, mask, past}
let open = null; // what changes with the form while the canvas is open

hear("wish", () => open?.());

/** Return a button that opens the canvas for a start picture, if the model takes a mask or new space. */
export const canvasButton = (form) => () =>
  takes(form, "mask") &&
  h("button", { type: "button", class: "small", onclick: () => openCanvas(form) }, icon("brush"), t("openCanvas"));

/** Open the canvas for the start picture of a form. */
export async function openCanvas(form) {
  const image = valueOf(form.get("image"));
  try {
    const picture = await load(addressOf(image));
    show(form, image, picture, await maskFor(form, image, picture));
  } catch (error) {
    complain(error);
  }
}

/** Return {mask, past}: what was painted last, or the mask of the form, or a black one. */
async function maskFor(form, image, { naturalWidth, naturalHeight }) {
  const name = valueOf(form.get("mask"));
  if (last?.image === image && last.name === name) return last;
  const scale = Math.min(1, Math.sqrt(AREA / (naturalWidth * naturalHeight)));
  const [width, height] = [naturalWidth, naturalHeight].map((side) => Math.max(1, Math.round(side * scale)));
  const mask = blank(width, height);
  if (name) read(await load(addressOf(name)), mask);
  return { mask, past: newPast() };
}

/** Read a picture into a mask: its white part, or its transparent part if it has one. It is scaled to cover. */
function read(picture, { width, height, bytes }) {
  const page = document.createElement("canvas").getContext("2d");
  [page.canvas.width, page.canvas.height] = [width, height];
  const scale = Math.max(width / picture.naturalWidth, height / picture.naturalHeight);
  const [across, down] = [picture.naturalWidth * scale, picture.naturalHeight * scale];
  page.imageSmoothingEnabled = Math.abs(scale - 1) > 1e-6;
  page.drawImage(picture, (width - across) / 2, (height - down) / 2, across, down);
  const { data } = page.getImageData(0, 0, width, height);
  let clear = false;
  for (let i = 3; i < data.length && !clear; i += 4) clear = data[i] < 255;
  for (let i = 0, at = 0; i < bytes.length; i += 1, at += 4)
    bytes[i] = clear ? 255 - data[at + 3] : Math.round(0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2]);
}

/** Return a mask as a PNG: white is repainted. */
function encode({ width, height, bytes }) {
  const page = document.createElement("canvas").getContext("2d");
  [page.canvas.width, page.canvas.height] = [width, height];
  const image = page.createImageData(width, height);
  const dots = new Uint32Array(image.data.buffer);
  for (let i = 0; i < bytes.length; i += 1) dots[i] = (0xff000000 | (bytes[i] * 0x010101)) >>> 0;
  page.putImageData(image, 0, 0);
  return new Promise((resolve) => page.canvas.toBlob(resolve, "image/png"));
}

async function load(address) {
  const picture = new Image();
  picture.src = address;
  await picture.decode().catch(() => {
    throw new Error(t("pictureGone"));
  });
  return picture;
}

function show(form, image, picture, { mask, past }) {
  const { naturalWidth: width, naturalHeight: height } = picture;
  const value = (name) => (takes(form, name) ? valueOf(form.get(name)) : null);
  const sides = () => readExtend(value("extend"), { width, height });
  const extendTo = (next) => give(form.get("extend"), writeExtend(next));
  const options = () => ({
    invert: Boolean(value("mask_invert")) && shareOfMask > 0,
    soft: Boolean(value("mask_soft")),
    grow: value("mask_grow") ?? 0,
    blur: value("mask_blur") ?? 0,
    extend: sides(),
  });
  let shareOfMask = shareOf(mask);
  let changed = false;
  const painted = () => {
    changed = true;
    shareOfMask = shareOf(mask);
    refresh();
  };
  const board = newBoard({ picture, mask, past, options, extendTo, painted });
  const { element: bar, refresh: refreshBar } = toolbar(board, past, takes(form, "extend"), (name) => {
    size.element.hidden = name !== "brush";
    numbers.element.hidden = name !== "extend";
  });
  const size = sizes(board);
  const strength = strengths(board);
  const numbers = edges({ width, height }, sides, (next) => (extendTo(next), board.fit()));
  const fields = FIELDS.filter((name) => takes(form, name)).map((name) => control(form.get(name), "canvas"));
  const note = h("p", { class: "quiet", role: "status" });
  const done = h("button", { type: "button", class: "primary", onclick: () => dialog.close() }, t("done"));
  const side = h(
    "div",
    { class: "canvas-side" },
    h(
      "div",
      { class: "canvas-options" },
      h("div", { class: "fields" }, size.element, strength.element, numbers.element, fields.map((one) => one.element)),
      note,
      h("p", { class: "keys", id: "canvas-keys" }, t("canvasKeys")),
    ),
    done,
  );
  const dialog = openDialog(
    "canvas",
    t("canvas"),
    h("div", { class: "canvas-body" }, h("div", { class: "canvas-main" }, bar, board.element), side),
  );

  function refresh() {
    refreshBar();
    strength.element.hidden = !value("mask_soft");
    if (!value("mask_soft")) board.tool.strength = 255;
    size.refresh();
    numbers.refresh();
    for (const one of fields) if (!one.element.contains(document.activeElement)) one.refresh();
    const percent = Math.round(shareOfMask * 1000) / 10;
    const made = value("mask_from") && !shareOfMask;
    note.textContent = made ? t("maskMadeFrom", { from: value("mask_from") }) : t("maskShare", { n: percent });
    board.refresh();
  }

  /** Upload a changed mask and put it into the form. */
  async function save() {
    if (!changed) return;
    try {
      const name = shareOfMask ? await upload(await encode(mask)) : null;
      give(form.get("mask"), name);
      if (name && takes(form, "mask_from")) give(form.get("mask_from"), null);
      last = { ...last, name };
    } catch (error) {
      complain(error); // the mask is still here when the canvas is opened again
    }
  }

  past.changed = refresh;
  open = refresh;
  dialog.addEventListener("keydown", (event) => key(event, board, past, bar));
  dialog.addEventListener("cancel", (event) => {
    if (!board.busy()) return;
    event.preventDefault();
    board.cancel();
  });
  dialog.addEventListener("close", () => {
    open = null;
    past.changed = () => {};
    board.close();
    last = { image, name: valueOf(form.get("mask")), mask, past };
    hold(save());
  });
  bar.querySelector('[data-tool="brush"]').click();
  refresh();
  board.fit();
  board.element.querySelector("canvas").focus({ preventScroll: true });
}

/** Return the tools and actions above the board: {element, refresh}. chosen(name) is called for each choice. */
function toolbar(board, past, extends_, chosen) {
  const tools = TOOLS.filter(([name]) => name !== "extend" || extends_).map(([name, letter]) => {
    const choose = (event) => {
      board.use(name);
      for (const one of tools) one.setAttribute("aria-pressed", String(one.dataset.tool === name));
      chosen(name);
      if (event.detail) board.element.querySelector("canvas").focus({ preventScroll: true }); // clicked with a pointer
    };
    const label = `${t(`tool.${name}`)} (${letter.toUpperCase()})`;
    return iconButton(name, label, choose, { data: { tool: name, key: letter } });
  });
  const erase = () => {
    board.tool.erases = !board.tool.erases;
    refresh();
  };
  const eraser = iconButton("eraser", `${t("eraser")} (E)`, erase, { data: { key: "e" } });
  const undo = iconButton("undo", `${t("undo")} (Ctrl+Z)`, past.undo);
  const redo = iconButton("redo", `${t("redo")} (Ctrl+Y)`, past.redo);
  const actions = [
    iconButton("invert", `${t("invertMask")} (I)`, board.invert, { data: { key: "i" } }),
    iconButton("trash", `${t("clearMask")} (Delete)`, board.clear, { data: { key: "delete" } }),
  ];
  const zooms = [
    iconButton("minus", `${t("zoomOut")} (-)`, () => board.zoom(1 / 1.25), { data: { key: "-" } }),
    iconButton("fit", `${t("zoomFit")} (0)`, board.fit, { data: { key: "0" } }),
    iconButton("plus", `${t("zoomIn")} (+)`, () => board.zoom(1.25), { data: { key: "+" } }),
  ];
  const group = (label, ...buttons) => h("div", { class: "row", role: "group", "aria-label": label }, buttons);
  const element = h(
    "div",
    { class: "canvas-tools" },
    group(t("tools"), tools, eraser),
    group(t("undo"), undo, redo),
    group(t("field.mask"), actions),
    group(t("zoom"), zooms),
  );
  const refresh = () => {
    eraser.setAttribute("aria-pressed", String(board.tool.erases));
    undo.disabled = !past.canUndo();
    redo.disabled = !past.canRedo();
  };
  return { element, refresh };
}

/** Return the size of the brush: {element, refresh}. The slider's steps are larger for larger brushes. */
function sizes(board) {
  const entry = h("input", { type: "number", id: "canvas-size", min: 1, max: LARGEST, inputmode: "numeric" });
  const slider = h("input", { type: "range", min: 0, max: 100, step: 1, tabindex: "-1", "aria-label": t("brushSize") });
  const change = (size) => {
    board.tool.size = Math.min(LARGEST, Math.max(1, Math.round(size)));
    refresh();
    board.draw();
  };
  const refresh = () => {
    if (document.activeElement !== entry) entry.value = board.tool.size;
    slider.value = (100 * Math.log(board.tool.size)) / Math.log(LARGEST);
    slider.style.setProperty("--part", `${slider.value}%`);
  };
  slider.addEventListener("input", () => change(LARGEST ** (slider.value / 100)));
  entry.addEventListener("input", () => entry.value !== "" && entry.checkValidity() && change(Number(entry.value)));
  entry.addEventListener("change", () => (entry.value = board.tool.size));
  return { element: pair("canvas-size", t("brushSize"), slider, entry), refresh };
}

/** Return the strength that a soft mask is painted with: {element}. */
function strengths(board) {
  const ends = { min: 1, max: 100, value: 100 };
  const entry = h("input", { type: "number", id: "canvas-strength", inputmode: "numeric", ...ends });
  const slider = h("input", { type: "range", tabindex: "-1", "aria-label": t("brushStrength"), ...ends });
  const change = (from, to) => {
    if (from.value === "" || !from.checkValidity()) return;
    to.value = from.value;
    slider.style.setProperty("--part", `${slider.value}%`);
    board.tool.strength = Math.round(2.55 * Number(from.value));
  };
  slider.style.setProperty("--part", "100%");
  slider.addEventListener("input", () => change(slider, entry));
  entry.addEventListener("input", () => change(entry, slider));
  return { element: pair("canvas-strength", t("brushStrength"), slider, entry) };
}

const pair = (id, title, slider, entry) =>
  h(
    "div",
    { class: "field" },
    h("div", { class: "field-head" }, h("label", { for: id }, title)),
    h("div", { class: "pair" }, slider, entry),
  );

/** Return number boxes for the new space on each side: {element, refresh}. */
function edges({ width, height }, sides, changed) {
  const boxes = SIDES.map((side) => {
    const box = h("input", { type: "number", min: 0, max: MOST, inputmode: "numeric", id: `extend-${side}` });
    box.addEventListener("input", () => {
      if (box.value !== "" && box.checkValidity()) changed({ ...sides(), [side]: Number(box.value) });
    });
    box.addEventListener("change", () => (box.value = sides()[side]));
    return { side, box };
  });
  const whole = h("p", { class: "quiet" });
  const element = h(
    "div",
    { class: "field", role: "group", "aria-label": t("field.extend") },
    h("div", { class: "field-head" }, h("span", { class: "name" }, t("newSpace"))),
    h(
      "div",
      { class: "four" },
      boxes.map(({ side, box }) => h("div", {}, h("label", { for: box.id }, t(`side.${side}`)), box)),
    ),
    whole,
  );
  const refresh = () => {
    const now = sides();
    for (const { side, box } of boxes) if (document.activeElement !== box) box.value = now[side];
    whole.textContent = `${width} × ${height} → ${now.left + width + now.right} × ${now.top + height + now.bottom}`;
  };
  return { element, refresh };
}

/** Handle a key of the canvas. */
function key(event, board, past, bar) {
  if (event.target.matches("input:not([type=range], [type=checkbox]), select, textarea")) return;
  const command = event.ctrlKey || event.metaKey;
  const name = event.key.toLowerCase();
  let does = null;
  if (command && name === "z") does = () => (event.shiftKey ? past.redo() : past.undo());
  else if (command && name === "y") does = past.redo;
  else if (command || event.altKey) return;
  else if (name === "[" || name === "]") {
    does = () => {
      const by = name === "]" ? 1.2 : 1 / 1.2;
      const size = Math.round(board.tool.size * by);
      board.tool.size = Math.min(LARGEST, Math.max(1, size === board.tool.size ? size + Math.sign(by - 1) : size));
      open();
      speak(t("brushIs", { n: board.tool.size }), false);
    };
  } else {
    const wanted = { "=": "+", backspace: "delete" }[name] ?? name;
    const button = [...bar.querySelectorAll("[data-key]")].find((one) => one.dataset.key === wanted);
    if (button) does = () => button.click();
  }
  if (!does || board.busy()) return;
  event.preventDefault();
  does();
}
