// Short lines at the foot of the page: what went wrong with its remedy, what can be undone; and what is read aloud.

import { byId, h, iconButton } from "./dom.js";
import { t } from "./words.js";

const SECONDS = 8;

/**
 * Show one line. action: [label, function], a button beside it. lasting: until it is closed. Returns what takes it
 * away.
 */
export function notice(text, { kind = "plain", action = null, lasting = false } = {}) {
  const close = () => line.remove();
  const line = h(
    "div",
    { class: `notice ${kind}`, role: kind === "error" ? "alert" : "status" },
    h("p", {}, text),
    action && h("button", { type: "button", onclick: () => (close(), action[1]()) }, action[0]),
    iconButton("close", t("close"), close),
  );
  const place = document.querySelector("dialog[open] .notices-here") ?? byId("notices");
  place.append(line);
  while (place.children.length > 4) place.firstElementChild.remove();
  if (!lasting) setTimeout(close, SECONDS * 1000);
  return close;
}

/** Show what the server refused. */
export function complain(error) {
  if (!("status" in error)) console.error(error);
  const text = error.status === 0 ? t("noAnswer") : error.message;
  return notice(text, { kind: "error", lasting: error.status !== 0 });
}

/** An async function that complains where the given one fails. */
export const guarded =
  (work) =>
  async (...given) => {
    try {
      return await work(...given);
    } catch (error) {
      complain(error);
      return undefined;
    }
  };

let said = 0;

/** Have screen readers say something; what is said within a second of the last is dropped unless it matters. */
export function speak(text, matters = true) {
  const now = performance.now();
  if (!matters && now - said < 4000) return;
  said = now;
  byId("live").textContent = text;
}
