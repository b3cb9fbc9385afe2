// Comparisons: two pictures over each other with a movable line between them.

import { get } from "./api.js";
import { openDialog } from "./dialog.js";
import { h } from "./dom.js";
import { readExtend } from "./extend.js";
import { complain } from "./notice.js";
import { addressOf, isUpload } from "./pictures.js";
import { fieldTitle, t } from "./words.js";

/** Open the comparison of two pictures, with the differences of their requests. */
export async function openCompare(a, b) {
  let left, right;
  try {
    [left, right] = await Promise.all([a, b].map(({ id }) => get(`/v1/pictures/${id}`)));
  } catch (error) {
    complain(error);
    return;
  }
  const sides = [left, right].map(({ url, prompt }, i) => ({ src: url, name: "AB"[i], alt: `${"AB"[i]}: ${prompt}` }));
  show(t("compare"), left, ...sides, differences(left, right));
}

/** Return the picture that a request edits: its start picture, or else its first reference; null without one. */
export const editedOf = ({ image, reference }) => [image, ...(reference ?? [])].find(isUpload) ?? null;

/** Open the comparison of a picture with the one that it was made from. */
export async function openBefore(picture) {
  const src = addressOf(editedOf(picture.request));
  const start = new Image();
  start.src = src;
  try {
    await start.decode();
  } catch {
    complain(new Error(t("pictureGone")));
    return;
  }
  const { extend } = picture.request;
  const [width, height] = [start.naturalWidth, start.naturalHeight];
  const { left, top } = readExtend(extend, { width, height });
  // With new space, the start picture is at its own size in the whole. Without, it was scaled to cover.
  const shares = { left: left / picture.width, top: top / picture.height };
  const box = extend && { ...shares, width: width / picture.width, height: height / picture.height };
  show(
    t("beforeAfter"),
    picture,
    { src, name: t("before"), alt: t("before"), box, covers: true },
    { src: picture.url, name: t("after"), alt: picture.prompt || t("after") },
  );
}

/**
 * Show two pictures, {src, name, alt, box, covers}, in the shape of the second argument. box: the place of a picture in
 * it, in shares. covers: a picture of another shape is cropped.
 */
function show(title, { width, height }, left, right, ...below) {
  const slider = h("input", {
    type: "range",
    min: 0,
    max: 100,
    step: 0.5,
    value: 50,
    "aria-label": t("compareSlider"),
  });
  const stage = h(
    "div",
    { class: "compare-stage" },
    layer("under", right),
    layer("over", left),
    h("span", { class: "line", "aria-hidden": "true" }),
    slider,
    h("b", { class: "a" }, left.name),
    h("b", { class: "b" }, right.name),
  );
  stage.style.aspectRatio = `${width} / ${height}`;
  stage.style.setProperty("--shape", width / height);
  const move = () => stage.style.setProperty("--at", `${slider.value}%`);
  slider.addEventListener("input", move);
  move();
  openDialog("compare", title, stage, ...below);
  slider.focus();
}

function layer(name, { src, alt, box, covers }) {
  const image = h("img", { src, alt });
  for (const [side, share] of Object.entries(box || {})) image.style[side] = `${100 * share}%`;
  return h("div", { class: covers ? `${name} covers` : name }, image);
}

function differences(left, right) {
  const names = [...new Set([...Object.keys(left.request), ...Object.keys(right.request)])];
  const tell = (value) => (value === undefined || value === null || value === "" ? "–" : String(value));
  const rows = names
    .map((name) => [name, tell(left.request[name]), tell(right.request[name])])
    .filter(([, one, other]) => one !== other);
  if (!rows.length) return h("p", { class: "quiet" }, t("sameRequest"));
  return h(
    "table",
    {},
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        [t("differs"), "A", "B"].map((text) => h("th", { scope: "col" }, text)),
      ),
    ),
    h(
      "tbody",
      {},
      rows.map(([name, one, other]) =>
        h("tr", {}, h("th", { scope: "row" }, fieldTitle(name)), h("td", {}, one), h("td", {}, other)),
      ),
    ),
  );
}
