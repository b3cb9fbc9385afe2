// Maps of a picture, such as its edges: chosen, seen beside the picture, and put in its place.

import { get, post } from "./api.js";
import { openDialog } from "./dialog.js";
import { h, icon } from "./dom.js";
import { keep, recollect } from "./memory.js";
import { complain } from "./notice.js";
import { addressOf, chooseFiles } from "./pictures.js";
import { isGiven, valueOf } from "./wish.js";
import { known, t } from "./words.js";

const PAUSE = 250; // milliseconds after a change of a setting
let kinds = null; // of the server

/** Return a button that opens the dialog. name: that of the picture's upload. taken(name) gets the map's upload. */
export const mapButton = (form, name, taken) =>
  h(
    "button",
    { type: "button", class: "small", onclick: () => openMaps(form, name, taken) },
    icon("map"),
    t("makeMap"),
  );

async function openMaps(form, name, taken) {
  try {
    kinds ??= (await get("/v1/maps")).data;
  } catch (error) {
    complain(error);
    return;
  }
  const sides = sizeOf(form);
  const values = { map: recollect("map", "canny"), settings: {}, keypoints: null };
  const picture = h("img", { src: addressOf(name), alt: t("controlPicture", { n: "" }) });
  const map = h("img", { alt: t("theMap"), hidden: true });
  const status = h("p", { class: "quiet", role: "status" });
  const options = h("div", { class: "map-settings" });
  const use = h("button", { type: "button", class: "primary", disabled: true, onclick: () => accept() }, t("useMap"));
  const select = h(
    "select",
    { id: "map-kind" },
    kinds.map((kind) => h("option", { value: kind.name }, known(`map.${kind.name}`, kind.name))),
  );
  let made = null;
  let asked = 0;
  let waiting = 0;

  const kindOf = () => kinds.find((kind) => kind.name === values.map) ?? kinds[0];

  const draw = async () => {
    const kind = kindOf();
    const own = ++asked;
    made = null;
    use.disabled = true;
    if (kind.missing || (kind.reads === "keypoints" && !values.keypoints)) {
      map.hidden = true;
      status.textContent = kind.missing ?? t("keypointsWanted");
      return;
    }
    status.textContent = t("drawingMap");
    const source = kind.reads === "keypoints" ? { keypoints: values.keypoints } : { picture: name };
    try {
      const answer = await post("/v1/maps", { map: kind.name, ...source, ...sides, settings: values.settings });
      if (own !== asked) return; // another one was asked for
      made = `upload:${answer.id}`;
      map.src = addressOf(made);
      map.hidden = false;
      use.disabled = false;
      status.textContent = `${answer.width} × ${answer.height}`;
    } catch (error) {
      if (own !== asked) return;
      map.hidden = true;
      status.textContent = error.message;
    }
  };
  const soon = () => {
    clearTimeout(waiting);
    waiting = setTimeout(draw, PAUSE);
  };
  const accept = () => {
    dialog.close();
    taken(made);
  };
  const choose = () => {
    values.map = select.value;
    values.settings = {};
    keep("map", select.value);
    const kind = kindOf();
    options.replaceChildren(
      h("p", { class: "quiet" }, known(`help.map.${kind.name}`, kind.help)),
      ...kind.settings.map((setting) => slider(setting, values.settings, soon)),
      ...(kind.reads === "keypoints" ? [keypoints(values, draw)] : []),
    );
    draw();
  };
  select.value = kindOf().name;
  select.addEventListener("change", choose);
  const side = h(
    "div",
    { class: "map-side" },
    h("div", { class: "field" }, h("label", { for: "map-kind" }, t("mapKind")), select),
    options,
    status,
    use,
  );
  const dialog = openDialog(
    "maps",
    t("makeMap"),
    h("div", { class: "maps-body" }, h("div", { class: "map-pictures" }, picture, h("div", { class: "map-place" }, map)), side),
  );
  dialog.addEventListener("close", () => (asked += 1));
  choose();
}

/** Return the size of the drawing, {width, height}, or nothing if the start picture decides it. */
function sizeOf(form) {
  const [width, height, image] = ["width", "height", "image"].map((name) => form.get(name));
  const decides = image?.effect === "honours" && valueOf(image) && !(isGiven(width) || isGiven(height));
  return decides ? {} : { width: valueOf(width), height: valueOf(height) };
}

/** Return the slider and the box of a setting. */
function slider({ name, help, default: usual, minimum, maximum }, settings, changed) {
  const id = `map-${name}`;
  const far = maximum <= 1 ? maximum : Math.min(maximum, Math.max(8 * usual, 1)); // useful values are near the usual one
  const whole = Number.isInteger(usual) && maximum > 10;
  const bar = h("input", { type: "range", min: minimum, max: far, step: whole ? 1 : far / 100, tabindex: "-1", "aria-label": help });
  const entry = h("input", { type: "number", id, min: minimum, max: maximum, step: "any", inputmode: "decimal" });
  const show = (value) => {
    bar.value = value;
    bar.style.setProperty("--part", `${(100 * (bar.value - minimum)) / (far - minimum)}%`);
    if (document.activeElement !== entry) entry.value = Number(Number(value).toPrecision(3));
  };
  const take = (from) => {
    if (from.value === "" || !from.checkValidity()) return;
    settings[name] = Number(from.value);
    show(from.value);
    changed();
  };
  bar.addEventListener("input", () => take(bar));
  entry.addEventListener("input", () => take(entry));
  entry.addEventListener("change", () => (entry.value = settings[name] ?? usual));
  show(usual);
  const label = h("label", { for: id, title: help }, known(`setting.${name}`, name));
  return h("div", { class: "field" }, h("div", { class: "field-head" }, label), h("div", { class: "pair" }, bar, entry));
}

/** Return a button that reads a file of keypoints. */
function keypoints(values, draw) {
  const read = async ([file]) => {
    try {
      const found = JSON.parse(await file.text());
      values.keypoints = Array.isArray(found) ? found[0] : found;
    } catch (error) {
      complain(new Error(t("notJson", { name: file.name })));
      return;
    }
    draw();
  };
  return h(
    "button",
    { type: "button", onclick: () => chooseFiles(false, read, "application/json,.json") },
    icon("plus"),
    t("openKeypoints"),
  );
}
