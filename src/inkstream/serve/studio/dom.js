// Elements from plain values, and icons. Text is inserted as text, never as markup.

/**
 * Return an element: h("button", { class: "quiet", onclick: go, data: { id: 3 } }, "Go"). Properties and children that
 * are null or false are left out. Children may be nested arrays.
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "data") Object.assign(element.dataset, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Return the element with an id. */
export const byId = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

/** SVG paths of icons, 24 by 24. */
const ICONS = {
  scales: "M12 4v16 M7.5 20h9 M5 6.500h14 M5 6.5L2.5 13a2.600 2.600 0 0 0 5 0z M19 6.5L16.5 13a2.600 2.600 0 0 0 5 0z",
  draw: "M12 3c3.4 4.2 5.2 7 5.2 9.6a5.2 5.2 0 0 1-10.4 0C6.8 10 8.6 7.2 12 3z M5 21h14",
  queue: "M4 6h16 M4 12h16 M4 18h10",
  gallery: "M4 4h7v7H4z M13 4h7v7h-7z M4 13h7v7H4z M13 13h7v7h-7z",
  search: "M10.5 4a6.5 6.5 0 1 1 0 13a6.5 6.5 0 0 1 0-13z M15.5 15.5L20 20",
  filter: "M4 6h16 M7 12h10 M10 18h4",
  star: "M12 3.8l2.5 5.2 5.7.8-4.1 4 1 5.7-5.1-2.7-5.1 2.7 1-5.7-4.1-4 5.7-.8z",
  trash: "M5 7h14 M10 7V4.5h4V7 M7 7l.8 12.5h8.4L17 7 M10.5 11v5 M13.5 11v5",
  close: "M6 6l12 12 M18 6L6 18",
  up: "M6 14.5l6-6 6 6",
  down: "M6 9.5l6 6 6-6",
  left: "M14.5 6l-6 6 6 6",
  right: "M9.5 6l6 6-6 6",
  pause: "M8.5 5v14 M15.5 5v14",
  play: "M8 5l11 7-11 7z",
  copy: "M9 9h11v11H9z M15 9V4H4v11h5",
  save: "M12 4v11 M7.5 11l4.5 4.5 4.5-4.5 M5 20h14",
  picture: "M4 5h16v14H4z M4 16l5-5 4 4 2.5-2.5L20 17 M15.5 9.5h.01",
  dice: "M5 5h14v14H5z M9 9h.01 M15 9h.01 M12 12h.01 M9 15h.01 M15 15h.01",
  swap: "M7 4v15 M3.5 15.5L7 19l3.5-3.5 M17 20V5 M13.5 8.5L17 5l3.5 3.5",
  history: "M4 5v5h5 M4.8 10a8 8 0 1 1-.6 4 M12 8v4.5l3 2",
  compare: "M12 3v18 M4 6h5v12H4 M20 6h-5v12h5",
  recall: "M9 14L4 9.5 9 5 M4 9.5h9.5a5.5 5.5 0 0 1 0 11H9",
  again: "M19.5 12a7.5 7.5 0 1 1-2.4-5.5 M19.5 4v4.5H15",
  check: "M5 12.5l4.5 4.5L19 7.5",
  sun: "M12 8a4 4 0 1 1 0 8a4 4 0 0 1 0-8z M12 3v1 M12 20v1 M3 12h1 M20 12h1 M6 6l.5 .5 M17.5 17.5l.5 .5 M6 18l.5-.5 M17.5 6.5l.5-.5",
  moon: "M19.5 14.5A8 8 0 1 1 9.5 4.5a6.5 6.5 0 0 0 10 10z",
  key: "M8 11a4 4 0 1 1 0 8a4 4 0 0 1 0-8z M11 12L19.5 3.5 M16 7l3 3",
  help: "M12 3a9 9 0 1 1 0 18a9 9 0 0 1 0-18z M9.5 9.5a2.5 2.5 0 1 1 3.6 2.3c-.8.4-1.1.9-1.1 1.7 M12 16.8h.01",
  grid: "M4 4h16v16H4z M4 9.5h16 M4 14.5h16 M9.5 4v16 M14.5 4v16",
  spark: "M12 3.5l1.9 6.6 6.6 1.9-6.6 1.9L12 20.5l-1.9-6.6L3.5 12l6.6-1.9z",
  plus: "M12 5v14 M5 12h14",
  minus: "M5 12h14",
  undo: "M9 14L4 9.5 9 5 M4 9.5h9.5a5.5 5.5 0 0 1 0 11H9",
  redo: "M15 14l5-4.5L15 5 M20 9.5h-9.5a5.5 5.5 0 0 0 0 11H15",
  brush: "M20 4c-4 2-8.5 6-10.5 9l1.5 1.5C14 12.5 18 8 20 4z M9 14.5a3.2 3.2 0 0 0-3.2 3c-.1 1.5-.8 2.3-2.3 2.600c2.5 1 7 .7 7.3-2.800z",
  eraser: "M9 19.500l-4.5-4.5a1.4 1.4 0 0 1 0-2l8.5-8.500a1.4 1.4 0 0 1 2 0l4.5 4.5a1.4 1.4 0 0 1 0 2L11 19.500z M8.5 9l6.5 6.5 M8 19.500h12",
  lasso: "M12 4.5c5 0 8.5 2.3 8.5 5.500s-3.5 5.5-8.5 5.500S3.5 13.2 3.5 10S7 4.5 12 4.5z M7 14.5a2 2 0 1 0 .01 0 M8.5 17.800c.5 1.5 0 2.5-1.5 3.2",
  box: "M4 6.500V4h2.5 M10.5 4h3 M17.5 4H20v2.5 M20 10.500v3 M20 17.500V20h-2.5 M13.5 20h-3 M6.5 20H4v-2.5 M4 13.500v-3",
  extend: "M8.5 8.500h7v7h-7z M12 5V2.5 M10.5 4L12 2.5 13.5 4 M12 19v2.5 M10.5 20l1.5 1.5 1.5-1.5 M5 12H2.5 M4 10.500L2.5 12 4 13.5 M19 12h2.5 M20 10.500l1.5 1.5-1.5 1.5",
  hand: "M8 13V6a1.5 1.5 0 0 1 3 0v5 M11 10.500V4.5a1.5 1.5 0 0 1 3 0v6 M14 10.500V6a1.5 1.5 0 0 1 3 0v8.500c0 3.5-2 6-5 6c-3.5 0-4.5-1.5-6.5-5l-1.5-2.700a1.4 1.4 0 0 1 2.3-1.600L8 13",
  invert: "M12 4a8 8 0 1 1 0 16a8 8 0 0 1 0-16z M12 4v16 M14.5 6.500v11 M17 8v8",
  fit: "M4 9V4h5 M15 4h5v5 M20 15v5h-5 M9 20H4v-5",
  split: "M4 5h16v14H4z M12 3v18 M12 9l7-4 M12 14l8-4.5 M13 18.5l7-4",
  map: "M4 6l5-2 6 2 5-2v14l-5 2-6-2-5 2z M9 4v14 M15 6v14",
  lock: "M6 11h12v9H6z M8.5 11V7.500a3.5 3.5 0 0 1 7 0V11",
  more: "M6 12h.01 M12 12h.01 M18 12h.01",
};

/** Return an icon. Screen readers skip it: the element around it has the label. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", `icon icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** Return a button that shows only an icon. `label` is its name and its tooltip. */
export function iconButton(name, label, onclick, properties = {}) {
  const given = { type: "button", class: "icon-only", "aria-label": label, title: label, onclick, ...properties };
  return h("button", given, icon(name));
}
