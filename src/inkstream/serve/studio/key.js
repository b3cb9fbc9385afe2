// The API key, if the server wants one. The browser stores it, and a cookie authenticates pictures and events.

import { identity, onNeedKey } from "./api.js";
import { openDialog } from "./dialog.js";
import { h } from "./dom.js";
import { keep, recollect } from "./memory.js";
import { t } from "./words.js";

let asking = null;

/** Return whether the server accepts a key. If it does, its answer sets the cookie of the session. */
async function open(key) {
  const answer = await fetch("/v1/session", { method: "POST", headers: identity(key) });
  return answer.ok;
}

/** Ask for a key when the server wants one, and open a session with the stored key. */
export async function setUpKey() {
  onNeedKey(() => (asking ??= askForKey().finally(() => (asking = null))));
  if (recollect("key")) await open(recollect("key")).catch(() => {});
}

/** Ask for a key until the server accepts it. */
export function askForKey() {
  return new Promise((resolve) => {
    const input = h("input", {
      type: "password",
      id: "key",
      autocomplete: "current-password",
      required: true,
      value: recollect("key") ?? "",
    });
    const wrong = h("p", { class: "bad", role: "alert" });
    const form = h(
      "form",
      { class: "fields" },
      h("p", {}, t("keyHow")),
      h("div", { class: "field" }, h("label", { for: "key" }, t("key")), input),
      wrong,
      h("footer", {}, h("button", { type: "submit", class: "primary" }, t("keyUse"))),
    );
    const dialog = openDialog("key", t("key"), form);
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const key = input.value.trim();
      if (!(await open(key).catch(() => false))) {
        wrong.textContent = t("keyWrong");
        return;
      }
      keep("key", key);
      resolve();
      dialog.close();
    });
    dialog.addEventListener("cancel", (event) => asking && event.preventDefault());
  });
}

/** Forget the key and reload the page. */
export async function forgetKey() {
  await fetch("/v1/session", { method: "DELETE", headers: identity() }).catch(() => {});
  keep("key", null);
  location.reload();
}
