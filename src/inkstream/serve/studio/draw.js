// Queues requests: drawings and drafts from the form, and requests of other modules.

import { post } from "./api.js";
import { say } from "./bus.js";
import { byId } from "./dom.js";
import { complain, notice, speak } from "./notice.js";
import { remember } from "./prompt.js";
import { presentForm, request, settled } from "./wish.js";
import { t } from "./words.js";
import { view } from "./views.js";
import { gridOf } from "./xy.js";

const DRAFTS = 9;

/** Return a random idempotency key: the server queues a repeated call only once. */
const token = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/** Queue a request and return its job. beside: note, priority, grid. The job goes on if this page is closed. */
export async function submit(made, beside = {}) {
  const job = await post("/v1/jobs", { ...made, ...beside }, { "Idempotency-Key": token() });
  say("job", job);
  return job;
}

/** Queue the request of the form. */
export async function draw() {
  await settled();
  const made = request(presentForm());
  if (empty(made)) return;
  const grid = gridOf(presentForm());
  if (grid) delete made.count;
  await queue(made, grid ? { grid } : {}, t("queued"));
}

/** Queue many pictures of the form's request with fewer steps: drafts to pick from. */
export async function draft() {
  await settled();
  const form = presentForm();
  const made = request(form);
  if (empty(made)) return;
  const steps = form.get("steps");
  made.count = Math.min(DRAFTS, form.get("count").maximum ?? DRAFTS);
  if (steps.default > 8) made.steps = Math.max(4, Math.round((made.steps ?? steps.default) / 2));
  await queue(made, { note: "draft" }, t("draftsQueued", { n: made.count }));
}

let unanswered = 0;

/** Queue a request. The button waits for the answer, because a double click means one picture; the keyboard does not. */
async function queue(made, beside, said) {
  unanswered += 1;
  byId("draw-now").disabled = true;
  try {
    await submit(made, beside);
    remember(made.prompt ?? "");
    speak(said);
    view("draw", { onlyNarrow: true });
    document.querySelector("main").scrollTo({ top: 0, behavior: "smooth" }); // in a narrow window the stage is above the form
  } catch (error) {
    complain(error);
    point(error.param);
  } finally {
    unanswered -= 1;
    byId("draw-now").disabled = unanswered > 0;
  }
}

/** Return whether a request has no prompt and no reference picture. If so, show a notice and focus the prompt. */
function empty(made) {
  if (made.prompt?.trim() || made.reference?.length) return false;
  notice(t("noPrompt"), { kind: "error" });
  point("prompt");
  return true;
}

/** Focus the field that an error is about. */
function point(name) {
  const place = name === "width" || name === "height" ? "size" : name;
  const field = place && document.querySelector(`[data-field="${CSS.escape(place)}"]`);
  if (!field) return;
  const section = field.closest("details");
  if (section) section.open = true;
  view("draw", { onlyNarrow: true });
  const entry = field.querySelector("textarea, input:not([type=range]), select") ?? field.querySelector("button");
  entry?.focus();
}
