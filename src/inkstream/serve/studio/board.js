// The drawing surface of the canvas: a picture with its mask over it, to paint on with a mouse, a pen or fingers.

import { h } from "./dom.js";
import { newEdges } from "./edges.js";
import { SIDES } from "./extend.js";
import { copyBox, drawBox, drawLine, drawPolygon, invert, joined, pasteBox } from "./mask.js";
import { regionOf } from "./region.js";
import { t } from "./words.js";

const COLOUR = [255, 45, 110]; // of the part that is repainted
const OPACITY = 0.6;
const MARGIN = 28; // pixels around the picture when all of it is shown
const PAUSE = 60; // milliseconds from a change to the preview of what the server will repaint

/**
 * Return a board. picture: an image element; mask: as in mask.js, of the picture's shape; past: of past.js.
 * options(): {invert, soft, grow, blur, extend {left, top, right, bottom}} in pixels of the picture. extendTo(sides) is
 * called with moved edges, and painted() after each change of the mask.
 */
export function newBoard({ picture, mask, past, options, extendTo, painted }) {
  const [width, height] = [picture.naturalWidth, picture.naturalHeight];
  const scale = mask.width / width; // pixels of the mask for each pixel of the picture
  const tool = { name: "brush", erases: false, size: Math.round(Math.max(width, height) / 12), strength: 255 };
  const view = { zoom: 1, x: 0, y: 0, fitted: true };
  const surface = h("canvas", {
    class: "surface",
    tabindex: "0",
    role: "application",
    "aria-label": t("canvasSurface"),
    "aria-describedby": "canvas-keys",
  });
  const edges = newEdges({
    view,
    sides: () => options().extend,
    moved(sides) {
      extendTo(sides);
      refresh();
    },
    released: () => fit(),
  });
  const element = h("div", { class: "board" }, surface, edges.element);
  const context = surface.getContext("2d");
  const overlay = document.createElement("canvas");
  let shown = { left: 0, top: 0, right: 0, bottom: 0 }; // new space of the overlay
  let cursor = null; // {x, y} in the picture
  let shape = null; // that is being drawn: {points, before, box, value}
  let moving = null; // the surface is being moved by fingers, the middle button or with Space
  let space = false;
  let waiting = 0;
  let painting = 0;

  // The picture ------------------------------------------------------------------------------------------------------

  const draw = () => {
    painting ||= requestAnimationFrame(() => {
      painting = 0;
      render();
    });
  };

  function render() {
    const dots = devicePixelRatio;
    const { left, top, right, bottom } = options().extend;
    const style = getComputedStyle(surface);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, surface.width, surface.height);
    context.setTransform(dots * view.zoom, 0, 0, dots * view.zoom, dots * view.x, dots * view.y);
    context.imageSmoothingEnabled = view.zoom < 3;
    context.fillStyle = style.borderTopColor;
    context.fillRect(-left, -top, left + width + right, top + height + bottom);
    hatch(style.color, left, top, right, bottom);
    context.drawImage(picture, 0, 0, width, height);
    context.globalAlpha = OPACITY;
    const whole = [shown.left + width + shown.right, shown.top + height + shown.bottom];
    context.drawImage(overlay, -shown.left, -shown.top, ...whole);
    context.globalAlpha = 1;
    outline();
    edges.place({ width, height, shown: tool.name === "extend" });
  }

  /** Draw lines over the new space. */
  function hatch(colour, left, top, right, bottom) {
    if (!(left || top || right || bottom)) return;
    context.save();
    context.beginPath();
    context.rect(-left, -top, left + width + right, top + height + bottom);
    context.clip();
    context.beginPath();
    const gap = 14 / view.zoom;
    const down = top + height + bottom;
    for (let x = -left - down; x < width + right; x += gap) {
      context.moveTo(x, height + bottom);
      context.lineTo(x + down, -top);
    }
    context.strokeStyle = colour;
    context.lineWidth = 1 / view.zoom;
    context.globalAlpha = 0.45;
    context.stroke();
    context.restore();
  }

  /** Draw the outline of the shape in progress, and the brush. Each line is dark with a light one in it. */
  function outline() {
    const path = new Path2D();
    if (shape?.points.length > 1 && tool.name !== "brush") {
      const [a, b] = [shape.points[0], shape.points.at(-1)];
      if (tool.name === "box") path.rect(a.x, a.y, b.x - a.x, b.y - a.y);
      else for (const [i, { x, y }] of shape.points.entries()) i ? path.lineTo(x, y) : path.moveTo(x, y);
    }
    if (cursor && tool.name === "brush" && !moving && !space)
      path.arc(cursor.x, cursor.y, shape?.radius ?? tool.size / 2, 0, 2 * Math.PI);
    else if (cursor && document.activeElement === surface && surface.matches(":focus-visible")) {
      path.moveTo(cursor.x - 9 / view.zoom, cursor.y);
      path.lineTo(cursor.x + 9 / view.zoom, cursor.y);
      path.moveTo(cursor.x, cursor.y - 9 / view.zoom);
      path.lineTo(cursor.x, cursor.y + 9 / view.zoom);
    }
    for (const [colour, line] of [
      ["#000000c0", 3],
      ["#ffffff", 1.2],
    ]) {
      context.strokeStyle = colour;
      context.lineWidth = line / view.zoom;
      context.stroke(path);
    }
  }

  /** Show the mask itself in a box, without what the server makes of it. */
  function showBox(box) {
    if (!box) return;
    const page = overlay.getContext("2d");
    const image = page.createImageData(box.right - box.left, box.bottom - box.top);
    const { invert: inverted } = options();
    let at = 0;
    for (let row = box.top; row < box.bottom; row += 1) {
      for (let i = row * mask.width + box.left; i < row * mask.width + box.right; i += 1) {
        image.data.set(COLOUR, at);
        image.data[at + 3] = inverted ? 255 - mask.bytes[i] : mask.bytes[i];
        at += 4;
      }
    }
    page.putImageData(image, Math.round(shown.left * scale) + box.left, Math.round(shown.top * scale) + box.top);
  }

  /** Show what the server will repaint. */
  function showRegion() {
    clearTimeout(waiting);
    waiting = 0;
    const { invert: inverted, soft, grow, blur, extend } = options();
    const near = Object.fromEntries(SIDES.map((side) => [side, Math.round(extend[side] * scale)]));
    const region = regionOf(mask, {
      invert: inverted,
      soft,
      grow: Math.round(grow * scale),
      blur: Math.round(blur * scale),
      extend: near,
    });
    [overlay.width, overlay.height] = [region.width, region.height];
    const page = overlay.getContext("2d");
    const image = page.createImageData(region.width, region.height);
    const dots = new Uint32Array(image.data.buffer);
    const colour = COLOUR[0] | (COLOUR[1] << 8) | (COLOUR[2] << 16);
    const { width: across, height: down, shares } = region;
    for (let y = 0, i = 0; y < down; y += 1) {
      for (let x = 0; x < across; x += 1, i += 1) {
        const kept =
          (x && !shares[i - 1]) ||
          (x < across - 1 && !shares[i + 1]) ||
          (y && !shares[i - across]) ||
          (y < down - 1 && !shares[i + across]);
        dots[i] = shares[i] && kept ? 0xffffffff : (colour | (shares[i] << 24)) >>> 0; // with a white outline
      }
    }
    page.putImageData(image, 0, 0);
    shown = { ...extend };
    element.dataset.shown = String(Number(element.dataset.shown ?? 0) + 1);
    draw();
  }

  const refresh = () => {
    if (shape) return;
    waiting ||= setTimeout(showRegion, PAUSE);
    draw();
  };

  // The view ---------------------------------------------------------------------------------------------------------

  function fit() {
    const { left, top, right, bottom } = options().extend;
    const [across, down] = [left + width + right, top + height + bottom];
    const room = [element.clientWidth - 2 * MARGIN, element.clientHeight - 2 * MARGIN];
    view.zoom = Math.max(0.01, Math.min(room[0] / across, room[1] / down, 8));
    view.x = (element.clientWidth - across * view.zoom) / 2 + left * view.zoom;
    view.y = (element.clientHeight - down * view.zoom) / 2 + top * view.zoom;
    view.fitted = true;
    draw();
  }

  /** Zoom, so that a place of the element stays where it is. */
  function zoom(by, x = element.clientWidth / 2, y = element.clientHeight / 2) {
    const next = Math.min(32, Math.max(0.02, view.zoom * by));
    view.x = x - ((x - view.x) * next) / view.zoom;
    view.y = y - ((y - view.y) * next) / view.zoom;
    view.zoom = next;
    view.fitted = false;
    draw();
  }

  function shift(x, y) {
    view.x += x;
    view.y += y;
    view.fitted = false;
    draw();
  }

  const watch = new ResizeObserver(() => {
    surface.width = Math.max(1, Math.round(element.clientWidth * devicePixelRatio));
    surface.height = Math.max(1, Math.round(element.clientHeight * devicePixelRatio));
    if (view.fitted) fit();
    render(); // at once: a resized canvas is empty
  });
  watch.observe(element);

  // Shapes -----------------------------------------------------------------------------------------------------------

  const onMask = ({ x, y }) => ({ x: x * scale, y: y * scale });

  function begin(point, erases) {
    shape = {
      points: [point],
      before: { ...mask, bytes: mask.bytes.slice() },
      box: null,
      value: erases ? 0 : tool.strength,
      radius: tool.name === "brush" ? point.radius : null,
    };
    if (tool.name === "brush") stroke(point, point);
    draw();
  }

  function stroke(a, b) {
    const [from, to] = [a, b].map((one) => ({ ...onMask(one), radius: one.radius * scale }));
    const box = drawLine(mask, from, to, shape.value);
    shape.box = joined(shape.box, box);
    showBox(box);
  }

  function add(point) {
    if (tool.name === "brush") stroke(shape.points.at(-1), point);
    shape.radius = point.radius;
    if (tool.name === "lasso") shape.points.push(point);
    else shape.points = [shape.points[0], point];
    if (tool.name === "brush") shape.points = [point];
    draw();
  }

  function end() {
    const { points, before, value } = shape;
    if (tool.name === "lasso" && points.length > 2) shape.box = drawPolygon(mask, points.map(onMask), value);
    if (tool.name === "box" && points.length > 1) shape.box = drawBox(mask, ...points.map(onMask), value);
    remember(before, shape.box);
    shape = null;
  }

  function cancel() {
    if (!shape) return;
    mask.bytes.set(shape.before.bytes);
    shape = null;
    refresh();
  }

  /** Make a step of the past of a changed box. */
  function remember(before, box) {
    if (box) {
      const [old, now] = [copyBox(before, box), copyBox(mask, box)];
      if (old.length !== now.length || old.some((value, i) => value !== now[i])) {
        const put = (runs) => () => {
          pasteBox(mask, box, runs);
          painted();
          showRegion();
        };
        past.add({ undo: put(old), redo: put(now), bytes: 4 * (old.length + now.length) });
        painted();
      }
    }
    showRegion();
  }

  /** Change all of the mask in one step. */
  function change(work) {
    const before = { ...mask, bytes: mask.bytes.slice() };
    work(mask);
    remember(before, { left: 0, top: 0, right: mask.width, bottom: mask.height });
  }

  // Pointers ---------------------------------------------------------------------------------------------------------

  const touches = new Map(); // fingers on the surface: id -> {x, y}
  let penned = false; // a pen was used: then fingers only move the surface

  const at = (event) => {
    const box = surface.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const radius = (tool.size / 2) * (event.pointerType === "pen" ? 0.25 + 0.75 * event.pressure : 1);
    return { x: (x - view.x) / view.zoom, y: (y - view.y) / view.zoom, radius: Math.max(0.5, radius) };
  };

  surface.addEventListener("pointerdown", (event) => {
    surface.focus({ preventScroll: true });
    surface.setPointerCapture(event.pointerId);
    event.preventDefault();
    penned ||= event.pointerType === "pen";
    const finger = event.pointerType === "touch";
    if (finger) touches.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (touches.size > 1) cancel();
    const moves = space || event.button === 1 || ["hand", "extend"].includes(tool.name) || (finger && penned);
    if (moves || touches.size > 1) {
      moving = { x: event.clientX, y: event.clientY };
      element.classList.add("moving");
    } else if ([0, 5].includes(event.button)) begin(at(event), (event.button === 5 || tool.erases) !== event.altKey);
    cursor = finger ? null : at(event);
    draw();
  });

  surface.addEventListener("pointermove", (event) => {
    cursor = event.pointerType === "touch" ? null : at(event);
    if (touches.has(event.pointerId) && touches.size > 1) pinch(event);
    else if (moving) {
      shift(event.clientX - moving.x, event.clientY - moving.y);
      moving = { x: event.clientX, y: event.clientY };
    } else if (shape) {
      const events = event.getCoalescedEvents?.() ?? [];
      for (const one of events.length ? events : [event]) add(at(one));
    }
    draw();
  });

  const up = (event) => {
    touches.delete(event.pointerId);
    if (touches.size) return;
    moving = null;
    element.classList.remove("moving");
    if (!shape) return;
    if (event.type === "pointerup") end();
    else cancel();
  };
  surface.addEventListener("pointerup", up);
  surface.addEventListener("pointercancel", up);
  surface.addEventListener("pointerleave", () => {
    if (shape) return;
    cursor = null;
    draw();
  });
  surface.addEventListener("contextmenu", (event) => event.preventDefault());
  surface.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const box = surface.getBoundingClientRect();
      const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 30 : 1;
      const speed = event.ctrlKey ? 0.01 : 0.0015; // a pinch on a touchpad is told as a wheel with Ctrl
      zoom(Math.exp(-event.deltaY * lines * speed), event.clientX - box.left, event.clientY - box.top);
    },
    { passive: false },
  );

  /** Two fingers: their middle moves the surface, and their distance zooms it. */
  function pinch(event) {
    const between = () => {
      const [a, b] = [...touches.values()];
      return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, apart: Math.hypot(a.x - b.x, a.y - b.y) };
    };
    const from = between();
    touches.set(event.pointerId, { x: event.clientX, y: event.clientY });
    const to = between();
    const box = surface.getBoundingClientRect();
    shift(to.x - from.x, to.y - from.y);
    if (from.apart > 0) zoom(to.apart / from.apart, to.x - box.left, to.y - box.top);
    moving = { x: event.clientX, y: event.clientY };
  }

  // Keys -------------------------------------------------------------------------------------------------------------

  surface.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (by) {
      event.preventDefault();
      cursor ??= { x: width / 2, y: height / 2 };
      const step = event.shiftKey ? 1 : Math.max(1, Math.round(tool.size / 4));
      cursor = { x: clamp(cursor.x + by[0] * step, width), y: clamp(cursor.y + by[1] * step, height) };
      if (shape && tool.name === "box") shape.points = [shape.points[0], cursor];
      draw();
    } else if (event.key === "Enter" && ["brush", "box"].includes(tool.name)) {
      event.preventDefault();
      cursor ??= { x: width / 2, y: height / 2 };
      const point = { ...cursor, radius: tool.size / 2 };
      if (shape) return (add(point), end());
      begin(point, tool.erases !== event.altKey);
      if (tool.name === "brush") end();
    } else if (event.key === " ") {
      event.preventDefault();
      space = true;
      element.classList.add("movable");
    }
    return undefined;
  });
  const lift = (event) => {
    if (event.type === "keyup" && event.key !== " ") return;
    space = false;
    element.classList.remove("movable");
    draw();
  };
  surface.addEventListener("keyup", lift);
  surface.addEventListener("blur", lift);

  showRegion();
  return {
    element,
    tool,
    refresh,
    draw,
    fit,
    zoom,
    cancel,
    busy: () => shape !== null,
    invert: () => change(invert),
    clear: () => change((whole) => whole.bytes.fill(0)),
    use(name) {
      cancel();
      tool.name = name;
      element.dataset.tool = name;
      draw();
    },
    close() {
      watch.disconnect();
      clearTimeout(waiting);
      cancelAnimationFrame(painting);
    },
  };
}

const clamp = (value, most) => Math.min(most, Math.max(0, value));
