// The choice of an upscaling model of the server's folder.

import { get } from "./api.js";
import { h } from "./dom.js";
import { helpOf, titleOf } from "./fields.js";
import { complain } from "./notice.js";
import { give, valueOf } from "./wish.js";
import { t } from "./words.js";

/** Return the control of the field `upscaler`: {element, refresh}. A model that the server lacks stays a choice. */
export function upscalersControl(field) {
  const select = h("select", { id: "field-upscaler", "aria-describedby": "field-upscaler-hint" });
  let names = [];
  const refresh = () => {
    const chosen = valueOf(field) ?? "";
    const all = names.includes(chosen) || !chosen ? names : [...names, chosen];
    select.replaceChildren(
      h("option", { value: "" }, t("noUpscaler")),
      ...all.map((name) => h("option", { value: name }, name)),
    );
    select.value = chosen;
  };
  select.addEventListener("change", () => give(field, select.value || null));
  refresh();
  get("/v1/upscalers").then((listed) => {
    names = listed.data.map((one) => one.name);
    refresh();
  }, complain);
  const head = h("div", { class: "field-head" }, h("label", { for: select.id, title: helpOf(field) }, titleOf(field)));
  const hint = h("p", { class: "hint", id: "field-upscaler-hint" }, helpOf(field));
  return { element: h("div", { class: "field choice", data: { field: "upscaler" } }, head, select, hint), refresh };
}
