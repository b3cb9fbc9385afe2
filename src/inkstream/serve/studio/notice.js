// Notices: short lines at the foot of the page, such as errors. And texts that screen readers read aloud.

import { byId, h, iconButton } from "./dom.js";
import { t } from "./words.js";

const SECONDS = 8;

/**
 * Show a notice. action: [label, function] of a button in it. lasting: it stays until the user closes it. Returns a
 * function that removes the notice.
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

/** Show an error. */
export function complain(error) {
  if (!("status" in error)) console.error(error);
  const text = error.status === 0 ? t("noAnswer") : error.message;
  return notice(text, { kind: "error", lasting: error.status !== 0 });
}

/** Return an async function that shows the errors of the given one. */
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

/** Let screen readers say a text. A text that does not matter is dropped within 4 seconds of the last one. */
export function speak(text, matters = true) {
  const now = performance.now();
  if (!matters && now - said < 4000) return;
  said = now;
  byId("live").textContent = text;
}
