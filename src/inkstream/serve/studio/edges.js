// Handles on the edges of the picture on the canvas. Dragged outwards, they make new space.

import { h } from "./dom.js";
import { MOST, SIDES } from "./extend.js";
import { t } from "./words.js";

const SNAP = 8; // pixels by which an edge moves
const INSET = 14; // pixels between a handle's middle and the window of the board

/**
 * Return the handles: {element, place}. view: {zoom, x, y} of the board. sides(): the new space now. moved(sides) is
 * called while an edge moves, and released() behind it.
 */
export function newEdges({ view, sides, moved, released }) {
  const handles = new Map(SIDES.map((side) => [side, handle(side)]));
  const element = h("div", { class: "edges", hidden: true }, [...handles.values()]);

  function handle(side) {
    const across = side === "left" || side === "right";
    const outward = side === "left" || side === "top" ? -1 : 1;
    const button = h("button", {
      type: "button",
      class: `edge ${side}`,
      role: "slider",
      "aria-label": t("extendSide", { side: t(`side.${side}`) }),
      "aria-orientation": across ? "horizontal" : "vertical",
      "aria-valuemin": 0,
      "aria-valuemax": MOST,
    });
    const move = (pixels) => moved({ ...sides(), [side]: Math.min(MOST, Math.max(0, pixels)) });
    const along = (event) => (across ? event.clientX : event.clientY);
    let held = null;
    button.addEventListener("pointerdown", (event) => {
      button.setPointerCapture(event.pointerId);
      held = { from: along(event), pixels: sides()[side] };
    });
    button.addEventListener("pointermove", (event) => {
      if (!held) return;
      const by = (outward * (along(event) - held.from)) / view.zoom;
      move(Math.round((held.pixels + by) / SNAP) * SNAP);
    });
    const release = () => {
      if (held) released();
      held = null;
    };
    button.addEventListener("pointerup", release);
    button.addEventListener("pointercancel", release);
    button.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, PageUp: -8, PageDown: 8 }[event.key];
      if (!steps) return;
      event.preventDefault();
      move(sides()[side] + outward * steps * SNAP);
      released();
    });
    return button;
  }

  /** Put the handles on the edges of a picture. */
  function place({ width, height, shown }) {
    element.hidden = !shown;
    if (!shown) return;
    const { left, top, right, bottom } = sides();
    const [x, y] = [(width + right - left) / 2, (height + bottom - top) / 2];
    const places = { left: [-left, y], right: [width + right, y], top: [x, -top], bottom: [x, height + bottom] };
    const within = (value, room) => Math.min(room - INSET, Math.max(INSET, value));
    for (const [side, button] of handles) {
      const [across, down] = places[side];
      button.style.left = `${within(across * view.zoom + view.x, element.clientWidth)}px`;
      button.style.top = `${within(down * view.zoom + view.y, element.clientHeight)}px`;
      button.setAttribute("aria-valuenow", sides()[side]);
      button.setAttribute("aria-valuetext", t("pixels", { n: sides()[side] }));
    }
  }

  return { element, place };
}
