// The viewer: one large picture, its request, and actions on it. Arrow keys show the pictures before and after it.

import { get } from "./api.js";
import { say } from "./bus.js";
import { editedOf, openBefore } from "./compare.js";
import { copyMenu } from "./copy.js";
import { verifyPart } from "./decide.js";
import { openDialog } from "./dialog.js";
import { h, icon, iconButton } from "./dom.js";
import { titleOf } from "./fields.js";
import { tellUse } from "./loras.js";
import { deletePictures, markFavourite, restorePictures } from "./marks.js";
import { takes } from "./models.js";
import { addControl } from "./nets.js";
import { guarded, notice } from "./notice.js";
import { addressOf, isUpload, put, uploadOf } from "./pictures.js";
import { recallRequest } from "./recall.js";
import { openRefine } from "./refine.js";
import { compareWith } from "./selection.js";
import { view } from "./views.js";
import { PICTURES, presentForm } from "./wish.js";
import { fieldTitle, known, moment, size, t } from "./words.js";

/** Show picture `index` of a sequence { size(), idAt(index), ensure?(index) }. */
export function openViewer(sequence, index) {
  const image = h("img", { alt: "", class: "large" });
  const stage = h("div", { class: "viewer-stage" }, image);
  const side = h("div", { class: "viewer-side" });
  const before = iconButton("left", t("previous"), () => go(-1), { class: "icon-only walk before" });
  const after = iconButton("right", t("following"), () => go(1), { class: "icon-only walk after" });
  stage.append(before, after);
  const dialog = openDialog("viewer", t("picture"), h("div", { class: "viewer-body" }, stage, side));
  let at = index;
  let picture = null;

  const show = guarded(async () => {
    before.disabled = at <= 0;
    after.disabled = at >= sequence.size() - 1;
    await sequence.ensure?.(at);
    const id = sequence.idAt(at);
    if (!id) return dialog.close();
    const found = await get(`/v1/pictures/${id}`);
    if (sequence.idAt(at) !== id || !dialog.open) return undefined; // the user has moved on
    picture = found;
    image.src = picture.url;
    image.alt = picture.prompt || t("noWords");
    stage.style.setProperty("--shape", picture.width / picture.height);
    side.replaceChildren(...facts(picture, { close: () => dialog.close(), show, next }));
    return undefined;
  });
  const go = (by) => {
    if (at + by < 0 || at + by >= sequence.size()) return;
    at += by;
    show();
  };
  /** Show the picture that took the place of a deleted one. */
  const next = () => {
    if (!sequence.size()) return dialog.close();
    at = Math.min(at, sequence.size() - 1);
    return show();
  };
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("textarea, input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const does = {
      ArrowLeft: () => go(-1),
      ArrowRight: () => go(1),
      f: () => side.querySelector(".mark").click(),
      Delete: () => side.querySelector(".delete").click(),
    }[event.key];
    if (does) (event.preventDefault(), does());
  });
  image.addEventListener("click", () => stage.classList.toggle("actual"));
  dialog.addEventListener("close", () => say("viewed", picture?.id));
  show();
}

function facts(picture, { close, show, next }) {
  const made = picture.request;
  const leave = (work) =>
    guarded(async () => {
      close();
      await work();
    });
  const mark = iconButton(
    "star",
    t("favourite"),
    guarded(async () => {
      await markFavourite(picture.id, !picture.favourite);
      await show();
    }),
    { class: "icon-only mark", "aria-pressed": String(picture.favourite) },
  );
  const remove = picture.deleted
    ? iconButton(
        "again",
        t("restore"),
        guarded(async () => (await restorePictures([picture]), next())),
        { class: "icon-only delete" },
      )
    : iconButton(
        "trash",
        t("delete"),
        guarded(async () => (await deletePictures([picture]), next())),
        { class: "icon-only delete" },
      );
  const download = h(
    "a",
    {
      class: "button icon-only",
      href: picture.url,
      download: `${picture.model}-${picture.seed}.png`,
      "aria-label": t("download"),
      title: t("download"),
    },
    icon("save"),
  );
  const check = verifyPart(picture);
  return [
    h("p", { class: "viewer-prompt" }, picture.prompt || t("noWords")),
    h(
      "div",
      { class: "row" },
      mark,
      download,
      copyMenu(() => made),
      remove,
    ),
    h(
      "div",
      { class: "viewer-actions" },
      action(
        "recall",
        t("useSettings"),
        leave(() => recallRequest(made)),
      ),
      action(
        "dice",
        t("newSeed"),
        leave(() => recallRequest(made, { keepSeed: false })),
      ),
      ...uses(picture, leave),
      action("spark", t("refine"), () => (close(), openRefine([picture]))),
      editedOf(made) && action("split", t("beforeAfter"), () => openBefore(picture)),
      action("compare", t("compareWith"), () => (close(), compareWith(picture))),
      action("grid", t("sheet"), () => (close(), say("open sheet", picture.job))),
      check.button,
    ),
    check.result,
    h(
      "dl",
      { class: "facts" },
      pairs(picture).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
    ),
    given(made),
  ];
}

const action = (name, text, onclick) => h("button", { type: "button", onclick }, icon(name), text);

/** Return buttons that put the picture into a field of the form. */
function uses(picture, leave) {
  const form = presentForm();
  const into = (name, text, add = put) =>
    form &&
    takes(form, name) &&
    action(
      "picture",
      text,
      leave(async () => {
        add(form.get(name), await uploadOf(picture));
        const section = document.querySelector(`#draw [data-field="${name}"]`)?.closest("details");
        if (section) section.open = true;
        view("draw", { onlyNarrow: true });
        document.querySelector(`#draw [data-field="${name}"]`)?.scrollIntoView({ block: "nearest" });
        notice(t("putInto", { field: titleOf(form.get(name)) }));
      }),
    );
  const control = (field, name) => addControl(form, name);
  return [
    into("image", t("startFrom")),
    into("reference", t("asReference")),
    into("control", t("asControl"), control),
  ];
}

function pairs(picture) {
  const fields = presentForm();
  const skip = new Set(["loras", "control_nets", "prompt", "model", "seed", "width", "height", "count", ...PICTURES]);
  const tell = (value) => (typeof value === "string" ? known(`choice.${value}`, value) : String(value));
  const dull = (name, value) => fields?.get(name)?.default === value && !["steps", "guidance"].includes(name);
  return [
    [t("model"), picture.model],
    [t("field.seed"), String(picture.seed)],
    [t("size"), `${picture.width} × ${picture.height}`],
    ...Object.entries(picture.request)
      .filter(([name, value]) => !skip.has(name) && value !== null && value !== "" && value.length !== 0 && !dull(name, value))
      .map(([name, value]) => [fieldTitle(name), tell(value)]),
    ...(picture.request.loras ?? []).map((use) => [t("lora"), tellUse(use)]),
    ...(picture.request.control_nets ?? []).map((use) => [t("controlNet"), use]),
    [t("drawnAt"), moment(picture.created)],
    [t("drawnIn"), `${picture.seconds.toFixed(1)} s`],
    [t("file"), `PNG, ${size(picture.bytes)}`],
  ];
}

/** Return the input pictures of a request. */
function given(made) {
  const names = PICTURES.flatMap((field) => made[field] ?? []).filter(isUpload);
  return names.length
    ? h(
        "div",
        { class: "slots" },
        names.map((name) => h("figure", { class: "slot" }, h("img", { src: addressOf(name), alt: t("madeFrom") }))),
      )
    : "";
}
