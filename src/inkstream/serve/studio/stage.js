// The stage: the picture that is being drawn, or one that was drawn, as large as the window allows, with what can be
// done with it. Below it is the filmstrip of the latest pictures.

import { get, remove, withQuery } from "./api.js";
import { hear, say } from "./bus.js";
import { openCanvas } from "./canvas.js";
import { lineOf, partOf } from "./card.js";
import { editedOf, openBefore, openCompare } from "./compare.js";
import { copyMenu } from "./copy.js";
import { byId, h, icon, iconButton } from "./dom.js";
import { submit } from "./draw.js";
import { lanes, take } from "./jobs.js";
import { deletePictures, markFavourite } from "./marks.js";
import { takes } from "./models.js";
import { complain, guarded, notice } from "./notice.js";
import { uploadOf } from "./pictures.js";
import { recallRequest } from "./recall.js";
import { openRefine } from "./refine.js";
import { openViewer } from "./viewer.js";
import { view } from "./views.js";
import { welcome } from "./welcome.js";
import { give, presentForm, valueOf } from "./wish.js";
import { t } from "./words.js";

const LATEST = 30; // pictures of the filmstrip
const VARIATIONS = 4;

let strip = []; // the latest pictures, newest first
let chosen = null; // the id of a chosen picture; null: the newest, or the one being drawn
let shown = null; // the picture on the stage, with its request
let begun = false; // the latest pictures are loaded

/** Fill the stage's section and keep it up to date. */
export function setUpStage() {
  const image = h("img", { class: "stage-image", alt: "", draggable: "true" });
  const open = h("button", { type: "button", class: "stage-open", title: t("openLarge"), onclick: enlarge }, image);
  const bar = h("progress", { max: 1, "aria-label": t("progress") });
  const line = h("p", { class: "stage-line" });
  const cancel = iconButton("close", t("cancel"), guarded(cancelRunning));
  const progress = h("div", { class: "stage-progress", hidden: true }, bar, line, cancel);
  const words = h("p", { class: "stage-prompt" });
  const tools = h("div", { class: "stage-tools", role: "toolbar", "aria-label": t("pictureTools") });
  const film = h("div", { class: "film", role: "group", "aria-label": t("latest") });
  const blank = h("div", { class: "stage-blank", hidden: true });
  const parts = { image, open, bar, line, progress, words, tools, film, blank };
  const foot = h("div", { class: "stage-foot" }, progress, words, tools, film);
  byId("stage").append(h("h2", { class: "unseen" }, t("stage")), h("div", { class: "stage-place" }, open, blank), foot);

  film.addEventListener("keydown", (event) => walk(event, film));
  let due = false;
  const refresh = () => {
    if (due) return;
    due = true;
    setTimeout(() => {
      due = false;
      show(parts);
    }, 30);
  };
  hear("jobs", refresh);
  hear("job", () => {
    chosen = null; // what was asked for last is what people wait for
    refresh();
  });
  hear("picture", (picture) => {
    strip = [picture, ...strip.filter((one) => one.id !== picture.id)].slice(0, LATEST);
    refresh();
  });
  hear("marked", (picture) => {
    if (shown?.id === picture.id) shown = null;
    refresh();
  });
  hear("deleted", (id) => {
    strip = strip.filter((one) => one.id !== id);
    if (chosen === id) chosen = null;
    refresh();
  });
  hear("restored", () => load().then(refresh, complain));
  hear("back", () => load().then(refresh, complain));
  hear("wish", (name) => name === "seed" && refresh());
  setInterval(() => lanes().running.length && refresh(), 1000);
  load().then(refresh, complain);
}

async function load() {
  strip = (await get(withQuery("/v1/pictures", { limit: LATEST }))).pictures;
  begun = true;
}

/** Return the job that is on the stage: the running one, unless a picture is chosen. */
const running = () => (chosen === null ? lanes().running[0] : undefined);

async function cancelRunning() {
  const job = running();
  if (job) take(await remove(`/v1/jobs/${job.id}`));
}

function show(parts) {
  const job = running();
  const id = job ? null : (chosen ?? strip[0]?.id ?? null);
  const none = begun && !job && id === null;
  byId("stage").classList.toggle("empty", none);
  parts.blank.hidden = !none;
  parts.open.hidden = none;
  if (none && !parts.blank.firstChild) parts.blank.append(welcome());
  parts.progress.hidden = !job;
  parts.open.disabled = Boolean(job);
  parts.open.classList.toggle("waiting", Boolean(job && !job.preview));
  showFilm(parts.film);
  if (job) {
    shown = null;
    const { width, height, prompt } = job.request;
    const form = presentForm();
    shape(parts.open, width ?? form?.get("width")?.default ?? 1, height ?? form?.get("height")?.default ?? 1);
    if (job.preview) parts.image.src = job.preview;
    else parts.image.removeAttribute("src");
    parts.image.alt = t("being", { prompt: prompt?.trim() || t("noWords") });
    parts.line.textContent = lineOf(job);
    const part = partOf(job);
    if (part === null) parts.bar.removeAttribute("value");
    else parts.bar.value = part;
    parts.words.textContent = prompt?.trim() || t("noWords");
    parts.tools.replaceChildren();
  } else if (id === null) {
    parts.words.textContent = "";
    parts.tools.replaceChildren();
  } else if (shown?.id === id) parts.tools.querySelector(".lock")?.setAttribute("aria-pressed", String(isLocked(shown)));
  else showPicture(parts, id).catch(complain);
}

/** Show a picture when its file is decoded, so that the preview grows into it without a flash. */
async function showPicture(parts, id) {
  shown = { id };
  const picture = await get(`/v1/pictures/${id}`);
  const file = new Image();
  file.src = picture.url;
  await file.decode().catch(() => {}); // a lost file is shown as such by the image itself
  if (shown?.id !== id) return; // another one is wanted by now
  shown = picture;
  parts.image.src = picture.url;
  parts.image.alt = picture.prompt || t("noWords");
  shape(parts.open, picture.width, picture.height);
  parts.words.textContent = picture.prompt || t("noWords");
  parts.tools.replaceChildren(...tools(picture));
}

const shape = (element, width, height) => element.style.setProperty("--shape", width / height);

function enlarge() {
  const at = strip.findIndex((one) => one.id === shown?.id);
  if (at >= 0) openViewer({ size: () => strip.length, idAt: (i) => strip[i]?.id ?? null }, at);
}

// The filmstrip ------------------------------------------------------------------------------------------------------

function showFilm(film) {
  const job = lanes().running[0];
  const frames = strip.map((one) => ({ key: one.id, src: one.thumbnail, name: one.prompt || t("noWords"), to: one.id }));
  if (job) frames.unshift({ key: `job ${job.id}`, src: job.preview, name: t("beingDrawn"), to: null });
  const now = job && chosen === null ? null : (chosen ?? strip[0]?.id);
  const old = new Map([...film.children].map((element) => [element.dataset.key, element]));
  const elements = frames.map(({ key, src, name, to }) => {
    const element = old.get(key) ?? frame(key, to);
    const [image] = element.children;
    if (src && image.getAttribute("src") !== src) image.src = src;
    element.setAttribute("aria-label", name);
    element.title = name;
    if (to === now) element.setAttribute("aria-current", "true");
    else element.removeAttribute("aria-current");
    element.tabIndex = to === now ? 0 : -1;
    return element;
  });
  for (const element of old.values()) if (!elements.includes(element)) element.remove();
  elements.forEach((element, i) => {
    if (film.children[i] !== element) film.insertBefore(element, film.children[i] ?? null);
  });
  film.hidden = elements.length < 2;
}

function frame(key, to) {
  const choose = () => {
    chosen = to;
    say("jobs");
  };
  const image = h("img", { alt: "", loading: "lazy", draggable: "false" });
  return h("button", { type: "button", class: "frame", data: { key }, onclick: choose }, image);
}

/** Arrow keys choose the picture before or after. */
function walk(event, film) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const next = by && film.children[[...film.children].indexOf(event.target) + by];
  if (!next) return;
  event.preventDefault();
  next.click();
  next.focus();
}

// What can be done with the picture ----------------------------------------------------------------------------------

const isLocked = (picture) => {
  const seed = presentForm()?.get("seed");
  return Boolean(seed) && valueOf(seed) === picture.seed;
};

function tools(picture) {
  const form = presentForm();
  const made = picture.request;
  const { seed: _, count: __, ...unseeded } = made;
  const tool = (name, text, does, properties = {}) =>
    h("button", { type: "button", class: "tool", title: text, onclick: guarded(does), ...properties }, [
      icon(name),
      h("span", {}, text),
    ]);
  const before = strip[strip.findIndex((one) => one.id === picture.id) + 1];
  const starts = form && takes(form, "image");
  const again = (count) => submit({ ...unseeded, count });
  const lock = tool("lock", t("keepSeed"), () => give(form.get("seed"), isLocked(picture) ? null : picture.seed), {
    class: "tool lock",
    "aria-pressed": String(isLocked(picture)),
  });
  const start = async () => {
    give(form.get("image"), await uploadOf(picture));
    const section = document.querySelector('[data-section="pictures"]');
    if (section) section.open = true;
  };
  return [
    tool("dice", t("another"), () => again(1)),
    tool("grid", t("variations"), () => again(Math.min(VARIATIONS, form?.get("count").maximum ?? VARIATIONS))),
    form && lock,
    starts && takes(form, "mask") && tool("brush", t("paint"), async () => (await start(), openCanvas(form))),
    starts && tool("picture", t("startFrom"), async () => (await start(), notice(t("putInto", { field: t("field.image") })))),
    starts &&
      takes(form, "upscale") &&
      tool("extend", t("upscale2"), async () => {
        const { model, prompt, negative_prompt, seed, loras } = made; // the rest says how the smaller picture was drawn
        const image = await uploadOf(picture);
        await submit({ model, prompt, negative_prompt, seed, loras, image, strength: 0, upscale: "2x" });
      }),
    tool("spark", t("refine"), () => openRefine([picture])),
    editedOf(made)
      ? tool("split", t("beforeAfter"), () => openBefore(picture))
      : before && tool("compare", t("compareBefore"), () => openCompare(picture, before)),
    tool("recall", t("useSettings"), () => recallRequest(made)),
    iconButton("star", t("favourite"), guarded(() => markFavourite(picture.id, !picture.favourite)), {
      class: "icon-only mark",
      "aria-pressed": String(picture.favourite),
    }),
    h(
      "a",
      {
        class: "button icon-only",
        href: picture.url,
        download: `${picture.model}-${picture.seed}.png`,
        "aria-label": t("download"),
        title: t("download"),
      },
      icon("save"),
    ),
    copyMenu(() => made),
    iconButton("gallery", t("inGallery"), () => view("gallery")),
    iconButton("trash", t("delete"), guarded(() => deletePictures([picture]))),
  ].filter(Boolean);
}
