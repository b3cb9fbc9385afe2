// Dialogs. They are the browser's own: they keep the focus and close with Escape.

import { byId, h, iconButton } from "./dom.js";
import { t } from "./words.js";

/** Open a dialog with a heading and content, and return its element. The element is removed when the dialog closes. */
export function openDialog(name, title, ...content) {
  const heading = `title-${name}`;
  const dialog = h("dialog", { class: `dialog ${name}`, "aria-labelledby": heading });
  const head = h(
    "header",
    {},
    h("h2", { id: heading }, title),
    iconButton("close", t("close"), () => dialog.close()),
  );
  dialog.append(head, ...content.flat().filter(Boolean), h("div", { class: "notices-here" }));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    byId("notices").append(...dialog.querySelectorAll(".notices-here > .notice")); // notices outlive the dialog
    dialog.remove();
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}
