// Recall: the form takes a request from the gallery, from a job, or from a picture that is dropped or opened.

import { post } from "./api.js";
import { say } from "./bus.js";
import { h, icon } from "./dom.js";
import { titleOf } from "./fields.js";
import { formOf, modelOf, takes } from "./models.js";
import { complain, notice } from "./notice.js";
import { chooseFiles, put, upload } from "./pictures.js";
import { view } from "./views.js";
import { chooseModel, chosenModel, giveGrid, presentForm, recall } from "./wish.js";
import { t } from "./words.js";

/** Take a request into the form. Its model is chosen if it is offered. A notice names the fields that were left out. */
export async function recallRequest(made, { keepSeed = true, grid = null, remarks = [], tool = null } = {}) {
  const said = [...remarks];
  if (modelOf(made.model)) chooseModel(made.model);
  else if (made.model) said.push(t("modelNotHere", { model: made.model }));
  const form = await formOf(chosenModel());
  const left = recall(made, form, { keepSeed });
  if (grid) giveGrid(grid);
  if (left.length) said.push(t("leftOut", { fields: left.map((name) => titleOf(form.get(name))).join(", ") }));
  say("recalled");
  view("draw", { onlyNarrow: true });
  notice([tool ? t("recalledFrom", { tool }) : t("recalled"), ...said].join(" "), {
    kind: said.length ? "warn" : "plain",
  });
}

/** Take the request of a picture's metadata into the form. */
export async function recallPicture(blob) {
  try {
    const { request, tool, remarks } = await post("/v1/recall", blob);
    await recallRequest(request, { tool, remarks });
  } catch (error) {
    complain(error);
  }
}

/** Let the user choose a picture to recall, instead of dropping it. */
export const openPicture = () => chooseFiles(false, ([file]) => file && recallPicture(file));

/** Set up the targets for dropped pictures. They are visible while a file is dragged over the page. */
export function setUpDrop() {
  const target = (name, text) =>
    h("div", { class: "drop-target", data: { drop: name } }, icon(name === "recall" ? "recall" : "picture"), text);
  const overlay = h("div", { class: "drop", hidden: true, "aria-hidden": "true" });
  const takers = new Map();
  const fill = () => {
    takers.clear();
    takers.set("recall", (files) => recallPicture(files[0]));
    const form = presentForm();
    for (const name of ["image", "reference"]) {
      if (form && takes(form, name)) takers.set(name, (files) => putAll(form.get(name), files));
    }
    const texts = { recall: t("dropRecall"), image: t("dropImage"), reference: t("dropReference") };
    overlay.replaceChildren(...[...takers.keys()].map((name) => target(name, texts[name])));
  };
  let depth = 0;
  const holds = (event) => event.dataTransfer?.types.includes("Files");
  const hide = () => {
    depth = 0;
    overlay.hidden = true;
  };
  addEventListener("dragenter", (event) => {
    if (!holds(event)) return;
    depth += 1;
    if (overlay.hidden) fill();
    overlay.hidden = false;
  });
  addEventListener("dragleave", (event) => holds(event) && (depth -= 1) <= 0 && hide());
  addEventListener("dragover", (event) => {
    if (!holds(event)) return;
    event.preventDefault();
    for (const one of overlay.children) one.classList.toggle("over", one.contains(event.target));
  });
  addEventListener("drop", (event) => {
    if (!holds(event)) return;
    hide();
    event.preventDefault();
    const name = event.target.closest?.("[data-drop]")?.dataset.drop ?? "recall";
    const files = [...event.dataTransfer.files];
    if (files.length) (takers.get(name) ?? takers.get("recall"))(files);
  });
  document.body.append(overlay);
}

async function putAll(field, files) {
  try {
    for (const file of field.type === "pictures" ? files : files.slice(0, 1)) put(field, await upload(file));
    const section = document.querySelector('[data-section="pictures"]');
    if (section) section.open = true;
    view("draw", { onlyNarrow: true });
  } catch (error) {
    complain(error);
  }
}
