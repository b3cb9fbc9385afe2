// The server's jobs, updated by its events. After a lost connection, all jobs are fetched again.

import { get, withQuery } from "./api.js";
import { hear, say } from "./bus.js";
import { complain, speak } from "./notice.js";
import { duration, pictureCount, t } from "./words.js";

const RECENT = 6;
const ENDED = new Set(["succeeded", "failed", "cancelled"]);

const all = new Map(); // id -> job: the server's fields and preview, loading, endsAt
let paused = false;
let online = null;

export const isEnded = (job) => ENDED.has(job.state);
export const isPaused = () => paused;
export const jobOf = (id) => all.get(id);

/** Return the running jobs, the queued jobs in their order, and the jobs that ended last. */
export function lanes() {
  const jobs = [...all.values()];
  return {
    running: jobs.filter((job) => job.state === "running").sort((a, b) => a.started - b.started),
    queued: jobs.filter((job) => job.state === "queued").sort((a, b) => (a.position ?? 0) - (b.position ?? 0)),
    recent: jobs
      .filter(isEnded)
      .sort((a, b) => b.ended - a.ended)
      .slice(0, RECENT),
  };
}

/**
 * Store a job of the server. Its preview and loading state, which come with events, are kept. An answer may be older than
 * the events that came before it: a job that has ended stays ended.
 */
export function take(job) {
  const before = all.get(job.id);
  if (before && isEnded(before) && !isEnded(job)) return;
  all.set(job.id, {
    preview: null,
    loading: null,
    ...before,
    ...job,
    endsAt: job.eta === null ? null : Date.now() + 1000 * job.eta,
  });
  say("jobs");
}

/** Stop showing a job that has ended. */
export function forget(id) {
  all.delete(id);
  say("jobs");
}

/** Fetch the queue and the recent jobs. */
export async function reload() {
  const [queue, recent] = await Promise.all([get("/v1/queue"), get(withQuery("/v1/jobs", { limit: RECENT }))]);
  const active = [...queue.running, ...queue.queued];
  const known = new Set([...active, ...recent.jobs].map((job) => job.id));
  for (const job of all.values()) if (!known.has(job.id) && !isEnded(job)) all.delete(job.id);
  for (const job of [...recent.jobs, ...active]) take(job);
  setPaused(queue.paused);
}

export function setPaused(value) {
  paused = value;
  say("jobs");
}

hear("job", take); // a job that this page has queued

/** Follow the server's events until the page is left. */
export function follow() {
  const source = new EventSource("/v1/events");
  source.addEventListener("open", () => {
    if (online === false) say("back");
    setOnline(true);
    reload().catch(complain);
  });
  source.addEventListener("error", () => {
    setOnline(false);
    if (source.readyState === EventSource.CLOSED) setTimeout(follow, 3000);
  });
  for (const [name, told] of Object.entries(TOLD)) {
    source.addEventListener(name, (event) => {
      const data = JSON.parse(event.data);
      if (name === "queue") setPaused(data.paused);
      else if (all.has(data.job)) told(all.get(data.job), data);
      else
        get(`/v1/jobs/${data.job}`).then(
          (job) => (take(job), told(all.get(job.id), data), say("jobs")),
          () => {},
        );
      say("jobs");
    });
  }
  addEventListener("pagehide", () => source.close(), { once: true });
}

function setOnline(value) {
  online = value;
  say("online", value);
}

const TOLD = {
  queue: null,
  queued(job, { position, eta }) {
    Object.assign(job, {
      state: "queued",
      position,
      eta,
      endsAt: eta === null ? null : Date.now() + 1000 * eta,
      progress: null,
      preview: null,
    });
  },
  loading(job, { what, done, total }) {
    Object.assign(job, {
      state: "running",
      position: null,
      loading: { what, done, total },
      started: job.started ?? Date.now() / 1000,
    });
  },
  step(job, { picture, of, step, steps, eta, preview }) {
    Object.assign(job, { state: "running", position: null, loading: null, progress: { picture, of, step, steps } });
    job.started ??= Date.now() / 1000;
    job.endsAt = eta === null ? null : Date.now() + 1000 * eta;
    job.preview = preview ?? job.preview;
    speak(
      t("spokenStep", { step, steps, picture: picture + 1, of, left: eta === null ? "" : duration(eta) }),
      step === 1 && picture === 0,
    );
  },
  picture(job, picture) {
    const own = { ...picture, job: job.id };
    if (!job.pictures.some((one) => one.id === own.id)) job.pictures = [...job.pictures, own];
    say("picture", own);
  },
  succeeded: end,
  failed: end,
  cancelled: end,
};

function end(job, told) {
  const { job: _, ...facts } = told;
  const news = !isEnded(job);
  Object.assign(job, facts, { loading: null, progress: null, preview: null, endsAt: null });
  if (!news) return;
  speak(t(`spoken.${job.state}`, { n: pictureCount(job.pictures.length) }));
  say("ended", job);
}
