// A search's pictures as one long list, of which only what was looked at is here. Pages follow each other by cursor.

import { get, withQuery } from "./api.js";

const PAGE = 120;
const MOST = 500; // that the server gives at once

/** What the gallery needs of a picture; the rest is asked for when it is opened. */
const slim = ({ id, job, width, height, seed, model, prompt, favourite, deleted, created, thumbnail, url }) => ({
  id, job, width, height, seed, model, prompt: prompt.slice(0, 300), favourite, deleted, created, thumbnail, url,
});

/** The list of a search. changed: called whenever there is more, or less, of it. */
export function pictureList(query, changed) {
  const items = [];
  const ids = new Set();
  let total = 0;
  let next = null;
  let begun = false;
  let ended = false; // nobody asks any more
  let fetching = null;

  const fetchPage = async (limit) => {
    const page = await get(withQuery("/v1/pictures", { ...query, limit, before: next }));
    if (ended) return;
    for (const picture of page.pictures) {
      if (ids.has(picture.id)) continue; // it came as news meanwhile
      ids.add(picture.id);
      items.push(slim(picture));
    }
    begun = true;
    next = page.next;
    total = next === null ? items.length : Math.max(page.total, items.length);
    changed();
  };

  return {
    size: () => total,
    at: (index) => items[index] ?? null,
    idAt: (index) => items[index]?.id ?? null,
    indexOf: (id) => (ids.has(id) ? items.findIndex((item) => item.id === id) : -1),
    isBegun: () => begun,

    /** Have the pictures up to an index, if there are so many. Calls while one is under way join it. */
    async ensure(index) {
      while (!ended && items.length <= index && (next !== null || !begun)) {
        const far = index - items.length > PAGE;
        fetching ??= fetchPage(far ? MOST : PAGE).finally(() => (fetching = null));
        await fetching;
      }
    },

    /** A new picture, which is the first. */
    prepend(picture) {
      if (ids.has(picture.id)) return;
      ids.add(picture.id);
      items.unshift(slim(picture));
      total += 1;
      changed();
    },

    /** Take a picture out; returns what puts it back. */
    take(id) {
      const index = items.findIndex((item) => item.id === id);
      if (index < 0) return () => {};
      const [item] = items.splice(index, 1);
      ids.delete(id);
      total -= 1;
      changed();
      return () => {
        if (ended || ids.has(id)) return;
        ids.add(id);
        items.splice(index, 0, item);
        total += 1;
        changed();
      };
    },

    /** Change what is known of a picture. */
    update(id, facts) {
      const item = ids.has(id) && items.find((one) => one.id === id);
      if (item) Object.assign(item, facts);
      changed();
    },

    end: () => (ended = true),
  };
}
