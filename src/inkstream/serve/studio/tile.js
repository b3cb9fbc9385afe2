// The tile of a picture in the gallery. The picture is a button; small buttons in its corners mark and pick it.

import { h, iconButton } from "./dom.js";
import { isPicked, toggle } from "./selection.js";
import { t } from "./words.js";

/** Return the scroller's tiles. list(): the present list; act: { open(index), favourite(id), focused() -> index }. */
export function tileMaker(list, act) {
  const shown = new WeakMap(); // element -> key of its content

  return {
    make(index) {
      const image = h("img", { alt: "", decoding: "async", draggable: "true" });
      const open = h("button", { type: "button", class: "tile-open", tabindex: "-1" }, image);
      const element = h("div", { class: "tile", role: "listitem", data: { index } }, open);
      open.addEventListener("click", (event) => {
        const item = list().at(index);
        if (!item) return;
        if (event.ctrlKey || event.metaKey || event.shiftKey) toggle(item);
        else act.open(index);
      });
      image.addEventListener("load", () => element.classList.add("loaded"));
      image.addEventListener("error", () => image.getAttribute("src") && element.classList.add("lost"));
      return element;
    },

    show(element, index, calm) {
      const item = list().at(index);
      const [open] = element.children;
      const image = open.firstElementChild;
      open.tabIndex = index === act.focused() ? 0 : -1;
      element.setAttribute("aria-setsize", list().size());
      element.setAttribute("aria-posinset", index + 1);
      const face = item ? `${item.id} ${item.favourite} ${isPicked(item.id)} ${open.tabIndex}` : "";
      if (item && calm && image.getAttribute("src") !== item.thumbnail) {
        element.classList.remove("lost");
        image.src = item.thumbnail;
      }
      if (shown.get(element) === face) return;
      shown.set(element, face);
      element.dataset.id = item?.id ?? "";
      if (!item) element.classList.remove("loaded");
      image.alt = item ? item.prompt || t("noWords") : "";
      for (const old of element.querySelectorAll(".corner")) old.remove();
      if (!item) return;
      element.classList.toggle("picked", isPicked(item.id));
      element.classList.toggle("favourite", item.favourite);
      const tabindex = String(open.tabIndex);
      element.append(
        iconButton("check", t("select"), () => toggle(item), {
          class: "icon-only corner pick",
          "aria-pressed": String(isPicked(item.id)),
          tabindex,
        }),
        iconButton("star", t("favourite"), () => act.favourite(item.id), {
          class: "icon-only corner mark",
          "aria-pressed": String(item.favourite),
          tabindex,
        }),
      );
    },

    gone(element) {
      element.querySelector("img").removeAttribute("src"); // stops a download of the picture
    },
  };
}
