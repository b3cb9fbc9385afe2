// The queue: running jobs are large, queued jobs follow in order, then the jobs that ended last.

import { ask } from "./api.js";
import { hear } from "./bus.js";
import { jobCard, moveBefore, partOf } from "./card.js";
import { byId, h, icon } from "./dom.js";
import { isPaused, lanes, setPaused } from "./jobs.js";
import { guarded } from "./notice.js";
import { countOf } from "./views.js";
import { t } from "./words.js";

const cards = new Map();
const KIND = "application/x-inkstream-job";

/** Fill the queue's section and keep it up to date. */
export function setUpQueue() {
  const pause = h("button", { type: "button", id: "pause", class: "small", onclick: guarded(togglePause) });
  const parts = Object.fromEntries(
    ["running", "queued", "recent"].map((name) => [name, h("div", { class: `jobs ${name}` })]),
  );
  const empty = h("p", { class: "quiet empty-queue" }, t("emptyQueue"));
  const titles = { recent: h("h3", {}, t("recent")) };
  byId("queue").append(
    h("div", { class: "section-head" }, h("h2", {}, t("queue")), pause),
    empty,
    parts.running,
    parts.queued,
    titles.recent,
    parts.recent,
  );
  takeDrops(parts.queued);
  let due = false;
  hear("jobs", () => {
    if (due) return;
    due = true;
    setTimeout(() => {
      due = false;
      show(parts, empty, titles, pause);
    }, 30);
  });
  setInterval(() => {
    for (const { tick } of cards.values()) tick();
  }, 1000);
}

function show(parts, empty, titles, pause) {
  const now = lanes();
  const active = now.running.length + now.queued.length;
  const seen = new Set();
  for (const [name, jobs] of Object.entries(now)) {
    const elements = jobs.map((job) => {
      seen.add(job.id);
      const card = cards.get(job.id) ?? jobCard(job);
      cards.set(job.id, card);
      card.update(job);
      card.element.draggable = job.state === "queued" && now.queued.length > 1;
      return card.element;
    });
    arrange(parts[name], elements);
  }
  for (const [id, card] of cards) if (!seen.has(id)) (card.element.remove(), cards.delete(id));
  empty.hidden = active + now.recent.length > 0;
  titles.recent.hidden = !now.recent.length;
  const paused = isPaused();
  if (pause.dataset.paused !== String(paused)) {
    pause.dataset.paused = String(paused);
    pause.replaceChildren(icon(paused ? "play" : "pause"), t(paused ? "goOn" : "pause"));
  }
  byId("queue").classList.toggle("paused", paused);
  document.body.classList.toggle("busy", active > 0);
  document.body.classList.toggle("has-jobs", active + now.recent.length > 0 || paused);
  document.body.classList.toggle("has-queue", active > 1 || paused); // the stage shows one
  document.title = now.running.length ? `${Math.round(100 * (partOf(now.running[0]) ?? 0))}% · inkstream` : "inkstream";
  countOf("queue", active);
}

/** Arrange the children of a place in order. Elements that are already in order are not moved. */
function arrange(place, elements) {
  for (const old of [...place.children]) if (!elements.includes(old)) old.remove();
  elements.forEach((element, i) => {
    if (place.children[i] !== element) place.insertBefore(element, place.children[i] ?? null);
  });
}

async function togglePause() {
  setPaused((await ask("PATCH", "/v1/queue", { paused: !isPaused() })).paused);
}

/** Let queued jobs be dragged to other places in the queue. */
function takeDrops(place) {
  const over = (event) => event.dataTransfer.types.includes(KIND);
  place.addEventListener("dragover", (event) => {
    if (over(event)) event.preventDefault();
  });
  place.addEventListener(
    "drop",
    guarded(async (event) => {
      if (!over(event)) return;
      event.preventDefault();
      const id = event.dataTransfer.getData(KIND);
      const target = event.target.closest(".job");
      const box = target?.getBoundingClientRect();
      const below = box && event.clientY > box.top + box.height / 2;
      const before = target ? (below ? target.nextElementSibling : target) : null;
      if (before?.dataset.id !== id) await moveBefore(id, before?.dataset.id ?? null);
    }),
  );
}
