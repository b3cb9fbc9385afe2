// Input pictures of a request: slots that take files and upload them to the server.

import { bytes, post } from "./api.js";
import { h, icon, iconButton } from "./dom.js";
import { helpOf, titleOf } from "./fields.js";
import { guarded, notice } from "./notice.js";
import { give, valueOf } from "./wish.js";
import { t } from "./words.js";

const PREFIX = "upload:";
const MOST = 10;

/** Return whether a name is that of an uploaded picture. */
export const isUpload = (name) => Boolean(name?.startsWith(PREFIX));

/** Return the address of an uploaded picture. */
export const addressOf = (name) => `/v1/uploads/${name.slice(PREFIX.length)}`;

/** Upload a picture. Returns its name in requests. */
export async function upload(blob) {
  return PREFIX + (await post("/v1/uploads", blob)).id;
}

/** Upload a picture of the gallery. Returns its name in requests. */
export const uploadOf = async (picture) => upload(await bytes(picture.url));

/** Put a picture into a field. A field of several pictures gets one more. */
export function put(field, name) {
  if (field.type === "picture") give(field, name);
  else if (valueOf(field).length >= MOST) notice(t("tooManyPictures", { n: MOST }), { kind: "error" });
  else give(field, [...valueOf(field), name]);
}

/** Let the user choose files. taken(files) is called with them. */
export function chooseFiles(several, taken, accept = "image/*") {
  const input = h("input", { type: "file", accept, multiple: several });
  input.addEventListener("change", () => taken([...input.files]));
  input.click();
}

/**
 * Return the slots of a field: {element, refresh}. tools: functions (field, name, place) => element that make buttons
 * beside a filled slot, such as one that opens the canvas.
 */
export function slots(field, tools = []) {
  const several = field.type === "pictures";
  const row = h("div", { class: "slots" });
  const add = guarded(async (files) => {
    for (const file of several ? files : files.slice(0, 1)) put(field, await upload(file));
  });
  const empty = h(
    "button",
    { type: "button", class: "slot empty", title: helpOf(field), onclick: () => chooseFiles(several, add) },
    icon("plus"),
    h("span", {}, titleOf(field)),
  );
  const refresh = () => {
    const names = several ? valueOf(field) : [valueOf(field)].filter(Boolean);
    const full = names.flatMap((name, place) => {
      const beside = tools.map((tool) => tool(field, name, place)).filter(Boolean);
      return [slot(field, name, place, several), ...(beside.length ? [h("div", { class: "slot-tools" }, beside)] : [])];
    });
    row.replaceChildren(...full, ...(several || !names.length ? [empty] : []));
  };
  refresh();
  const element = h(
    "div",
    { class: "field", role: "group", "aria-label": titleOf(field), data: { field: field.name } },
    row,
  );
  return { element, refresh };
}

function slot(field, name, place, several) {
  const label = several ? `${titleOf(field)} ${place + 1}` : titleOf(field);
  const drop = () => give(field, several ? valueOf(field).filter((_, i) => i !== place) : null);
  const image = h("img", { src: addressOf(name), alt: label });
  image.addEventListener("error", drop); // the server has deleted it
  return h(
    "figure",
    { class: "slot" },
    image,
    h("figcaption", {}, label),
    iconButton("close", t("takeAway", { what: label }), drop),
  );
}
