// A grid of tiles. Only visible tiles exist, so the cost does not grow with the number of pictures.

const MARGIN = 2; // rows kept above and below the visible ones
const STILL = 90; // pictures are loaded after so many milliseconds without scrolling

/**
 * Return a grid. view: the element that scrolls; field: the element that holds the tiles. source: { size(), need(from,
 * to) }; need is called with the range of visible tiles. tile: { make(index), show(element, index, calm),
 * gone(element) }; calm is false during fast scrolling.
 */
export function scroller(view, field, source, tile) {
  const tiles = new Map(); // by index
  let columns = 1;
  let side = 160;
  let gap = 8;
  let wanted = 170;
  let asked = 0;
  let settle = 0;
  let last = { top: 0, time: 0 };

  const measure = () => {
    const width = field.clientWidth;
    gap = width < 600 ? 4 : 8;
    columns = Math.max(2, Math.round((width + gap) / (wanted + gap)));
    side = (width - gap * (columns - 1)) / columns;
  };

  const place = (element, index) => {
    const row = Math.floor(index / columns);
    element.style.transform = `translate(${(index % columns) * (side + gap)}px, ${row * (side + gap)}px)`;
    element.style.width = element.style.height = `${side}px`;
  };

  const span = () => {
    const top = view.scrollTop - field.offsetTop;
    const rows = Math.ceil(source.size() / columns);
    const first = Math.max(0, Math.floor(top / (side + gap)) - MARGIN);
    const end = Math.min(rows, Math.ceil((top + view.clientHeight) / (side + gap)) + MARGIN);
    return [Math.min(first * columns, source.size()), Math.min(end * columns, source.size())];
  };

  const render = (calm) => {
    asked = 0;
    if (!view.clientHeight) return;
    field.style.height = `${Math.max(0, Math.ceil(source.size() / columns) * (side + gap) - gap)}px`;
    const [from, to] = span();
    for (const [index, element] of tiles) {
      if (index >= from && index < to) continue;
      tile.gone(element);
      element.remove();
      tiles.delete(index);
    }
    for (let index = from; index < to; index += 1) {
      let element = tiles.get(index);
      if (!element) {
        element = tile.make(index);
        tiles.set(index, element);
        const following = [...tiles.keys()].filter((other) => other > index).sort((a, b) => a - b)[0];
        field.insertBefore(element, following === undefined ? null : tiles.get(following));
      }
      place(element, index);
      tile.show(element, index, calm);
    }
    if (to > from) source.need(from, to);
  };

  const ask = (calm = true) => {
    if (!asked) asked = requestAnimationFrame(() => render(calm));
  };

  view.addEventListener(
    "scroll",
    () => {
      const now = { top: view.scrollTop, time: performance.now() };
      const speed = Math.abs(now.top - last.top) / Math.max(1, now.time - last.time);
      last = now;
      ask(speed < 4);
      clearTimeout(settle);
      settle = setTimeout(() => ask(true), STILL);
    },
    { passive: true },
  );
  new ResizeObserver(() => (measure(), ask())).observe(field);

  return {
    /** Show the present state of the source. */
    refresh: () => ask(true),
    columns: () => columns,
    elementOf: (index) => tiles.get(index) ?? null,

    /** Set the approximate side of tiles in pixels. */
    resize(pixels) {
      wanted = pixels;
      measure();
      ask();
    },

    /** Scroll a tile into view and return its element. */
    reveal(index) {
      const top = field.offsetTop + Math.floor(index / columns) * (side + gap);
      const head = parseFloat(getComputedStyle(view).scrollPaddingTop) || 0;
      if (top < view.scrollTop + head) view.scrollTop = top - head - gap;
      else if (top + side > view.scrollTop + view.clientHeight) view.scrollTop = top + side - view.clientHeight + gap;
      cancelAnimationFrame(asked);
      render(true);
      return tiles.get(index) ?? null;
    },
  };
}
