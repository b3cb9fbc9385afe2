// The card of a job in the queue: its prompt, its progress and its buttons. A card is updated in place, so that the
// focus and elements under the pointer stay.

import { patch, remove } from "./api.js";
import { h, icon, iconButton } from "./dom.js";
import { submit } from "./draw.js";
import { forget, isEnded, lanes, take } from "./jobs.js";
import { guarded } from "./notice.js";
import { recallRequest } from "./recall.js";
import { openSheet } from "./sheet.js";
import { openViewer } from "./viewer.js";
import { duration, known, pictureCount, t } from "./words.js";

/** Return the card of a job: {element, update, tick}. */
export function jobCard(first) {
  let job = first;
  const preview = h("img", { alt: "", class: "preview", draggable: "false" });
  const stage = h("div", { class: "stage" }, preview);
  const prompt = h("p", { class: "job-prompt" });
  const line = h("p", { class: "job-line" });
  const bar = h("progress", { max: 1, "aria-label": t("progress") });
  const pictures = h("div", { class: "job-pictures" });
  const buttons = h("div", { class: "row job-buttons" });
  const element = h(
    "article",
    { class: "job", data: { id: job.id } },
    stage,
    h("div", { class: "job-text" }, prompt, line, bar, pictures),
    buttons,
  );
  let shown = "";

  const update = (now) => {
    job = now;
    element.dataset.state = job.state;
    element.setAttribute("aria-label", `${known(`state.${job.state}`, job.state)}: ${short(job)}`);
    prompt.textContent = short(job);
    prompt.title = job.request.prompt ?? "";
    line.textContent = lineOf(job);
    line.classList.toggle("bad", job.state === "failed");
    const picture = job.preview ?? job.pictures.at(-1)?.thumbnail ?? "";
    stage.classList.toggle("void", !picture);
    if (picture && preview.getAttribute("src") !== picture) preview.src = picture;
    bar.hidden = job.state !== "running";
    const part = partOf(job);
    if (part === null) bar.removeAttribute("value");
    else bar.value = part;
    const facts = [job.state, job.pictures.length].join();
    if (facts === shown) return;
    shown = facts;
    pictures.replaceChildren(...thumbnails(job));
    buttons.replaceChildren(...actions(job));
  };
  element.addEventListener("dragstart", (event) => event.dataTransfer.setData("application/x-inkstream-job", job.id));
  update(first);
  return { element, update, tick: () => (line.textContent = lineOf(job)) };
}

const short = (job) => job.request.prompt?.trim() || t("noWords");

/** Return the progress of a running job from 0 to 1, or null if it is not known. */
export function partOf(job) {
  const at = job.progress;
  return at ? (at.picture + at.step / at.steps) / at.of : null;
}

/** Return a line about the job's state and progress. */
export function lineOf(job) {
  const left = job.endsAt === null ? null : Math.max(0, (job.endsAt - Date.now()) / 1000);
  const soon = left === null ? null : t("left", { time: duration(left) });
  const join = (...parts) => parts.filter(Boolean).join(" · ");
  if (job.state === "queued")
    return join(
      job.position === 0 ? t("next") : t("ahead", { n: job.position }),
      left === null ? null : t("readyIn", { time: duration(left) }),
    );
  if (job.state === "failed") return job.error?.message ?? t("state.failed");
  if (job.state !== "running")
    return join(t(`state.${job.state}`), job.pictures.length > 1 && pictureCount(job.pictures.length), ...job.remarks);
  if (job.loading || !job.progress) return join(known(`loading.${job.loading?.what}`, t("loading")), soon);
  const { picture, of, step, steps } = job.progress;
  return join(of > 1 && t("pictureOf", { n: picture + 1, of }), t("stepOf", { n: step, of: steps }), soon);
}

function thumbnails(job) {
  if (job.pictures.length < 2 && job.state !== "succeeded") return [];
  const sequence = { size: () => job.pictures.length, idAt: (i) => job.pictures[i]?.id ?? null };
  return job.pictures.slice(0, 12).map((picture, i) =>
    h(
      "button",
      {
        type: "button",
        class: "thumb",
        "aria-label": t("openNumber", { n: i + 1 }),
        onclick: () => openViewer(sequence, i),
      },
      h("img", { src: picture.thumbnail, alt: "", loading: "lazy" }),
    ),
  );
}

function actions(job) {
  if (isEnded(job)) {
    const many = job.pictures.length > 1;
    const pick = () =>
      h("button", { type: "button", class: "small", onclick: () => openSheet(job.id) }, icon("check"), t("pick"));
    return [
      many && (job.note === "draft" ? pick() : iconButton("grid", t("sheet"), () => openSheet(job.id))),
      job.state !== "succeeded" &&
        iconButton(
          "again",
          t("again"),
          guarded(() => submit(job.request, { note: job.note, ...(job.grid ? { grid: job.grid } : {}) })),
        ),
      iconButton(
        "recall",
        t("useSettings"),
        guarded(() => recallRequest(job.request, { grid: job.grid })),
      ),
      iconButton("close", t("dismiss"), () => forget(job.id)),
    ].filter(Boolean);
  }
  const cancel = iconButton(
    "close",
    t("cancel"),
    guarded(async () => take(await remove(`/v1/jobs/${job.id}`))),
  );
  if (job.state === "running") return [cancel];
  return [
    iconButton(
      "up",
      t("earlier"),
      guarded(() => move(job.id, -1)),
    ),
    iconButton(
      "down",
      t("later"),
      guarded(() => move(job.id, 1)),
    ),
    cancel,
  ];
}

/** Swap a queued job with the one before it (by = -1) or after it (by = 1). */
async function move(id, by) {
  const order = lanes().queued.map((job) => job.id);
  const at = order.indexOf(id) + by;
  if (at < 0 || at >= order.length) return;
  const before = by < 0 ? order[at] : (order[at + 1] ?? null);
  await moveBefore(id, before);
}

/** Move a queued job before another one, or to the end if `before` is null. */
export async function moveBefore(id, before) {
  take(await patch(`/v1/jobs/${id}`, { before }));
}
