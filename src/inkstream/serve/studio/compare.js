// A comparison: two pictures over each other with a movable line between them, and the differences of their requests.

import { get } from "./api.js";
import { openDialog } from "./dialog.js";
import { h } from "./dom.js";
import { complain } from "./notice.js";
import { fieldTitle, t } from "./words.js";

/** Open the comparison of two pictures. */
export async function openCompare(a, b) {
  let left, right;
  try {
    [left, right] = await Promise.all([a, b].map(({ id }) => get(`/v1/pictures/${id}`)));
  } catch (error) {
    complain(error);
    return;
  }
  const over = h("img", { class: "over", src: left.url, alt: `A: ${left.prompt}` });
  const under = h("img", { src: right.url, alt: `B: ${right.prompt}` });
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
    under,
    over,
    h("span", { class: "line", "aria-hidden": "true" }),
    slider,
    h("b", { class: "a" }, "A"),
    h("b", { class: "b" }, "B"),
  );
  stage.style.aspectRatio = `${left.width} / ${left.height}`;
  stage.style.setProperty("--shape", left.width / left.height);
  const move = () => stage.style.setProperty("--at", `${slider.value}%`);
  slider.addEventListener("input", move);
  move();
  openDialog("compare", t("compare"), stage, differences(left, right));
  slider.focus();
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
