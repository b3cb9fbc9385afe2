// The welcome in an empty gallery, with example prompts.

import { byId, h, icon } from "./dom.js";
import { view } from "./views.js";
import { give, presentForm } from "./wish.js";
import { t } from "./words.js";

/** Return the welcome. A click on an example puts it into the prompt. */
export function welcome() {
  const examples = [1, 2, 3, 4].map((n) => t(`example${n}`));
  const use = (prompt) => {
    give(presentForm().get("prompt"), prompt);
    view("draw", { onlyNarrow: true });
    byId("prompt").focus();
  };
  return h(
    "div",
    { class: "welcome" },
    icon("draw"),
    h("h3", {}, t("welcome")),
    h("p", {}, t("welcomeHow")),
    h(
      "div",
      { class: "examples" },
      examples.map((text) => h("button", { type: "button", onclick: () => use(text) }, text)),
    ),
    h("p", { class: "quiet" }, t("welcomeDrop")),
  );
}
