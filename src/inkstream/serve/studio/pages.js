// The pictures of a search as one long list. Only parts that were looked at are loaded. After the first page, any part
// can be fetched by its offset from the first page's cursor. New pictures do not move that cursor.

import { get, withQuery } from "./api.js";

const PAGE = 120;

/** Return the fields of a picture that the gallery needs. The viewer fetches the others. */
const slim = ({ id, job, width, height, seed, model, prompt, favourite, deleted, created, thumbnail, url }) => ({
  id,
  job,
  width,
  height,
  seed,
  model,
  prompt: prompt.slice(0, 300),
  favourite,
  deleted,
  created,
  thumbnail,
  url,
});

/** Return the list of a search. changed() is called after each change of the list. */
export function pictureList(query, changed) {
  const items = []; // parts that are not loaded are holes
  const ids = new Set();
  let total = 0;
  let begun = false;
  let ended = false; // the list is no longer used
  let cursor = null; // the cursor of the first page
  let behind = 0; // the index after the first page
  let wanted = [0, 1];
  let fetching = null;
  const early = []; // new pictures that came before the first page

  const put = (index, pictures) => {
    for (const picture of pictures.map(slim)) {
      if (ids.has(picture.id) && items[index]?.id !== picture.id) continue; // an event has added it meanwhile
      ids.add(picture.id);
      items[index] = picture;
      index += 1;
    }
  };

  /** Return the first wanted index that is not loaded, or -1. */
  const hole = () => {
    if (!begun) return 0;
    for (let index = wanted[0]; index < Math.min(wanted[1], total); index += 1) if (!items[index]) return index;
    return -1;
  };

  const fetchFrom = async (index) => {
    const offset = begun ? Math.max(0, index - behind) : 0;
    const page = await get(
      withQuery("/v1/pictures", { ...query, limit: PAGE, before: cursor, offset: offset || null }),
    );
    if (ended) return false;
    const at = behind + offset;
    put(at, page.pictures);
    total = page.next === null ? at + page.pictures.length : Math.max(total, page.total, items.length);
    if (!begun) [cursor, behind] = [page.next, page.pictures.length];
    begun = true;
    for (const picture of early.splice(0)) prepend(picture);
    changed();
    return Boolean(items[index]);
  };

  const fetchWanted = async () => {
    for (let index = hole(); index >= 0 && !ended; index = hole()) if (!(await fetchFrom(index))) break;
  };

  /** Add a new picture at the front. */
  const prepend = (picture) => {
    if (!begun) early.push(picture);
    if (!begun || ids.has(picture.id)) return;
    ids.add(picture.id);
    items.unshift(slim(picture));
    behind += 1;
    total += 1;
    changed();
  };

  return {
    size: () => total,
    at: (index) => items[index] ?? null,
    idAt: (index) => items[index]?.id ?? null,
    indexOf: (id) => (ids.has(id) ? items.findIndex((item) => item?.id === id) : -1),
    isBegun: () => begun,

    /** Load the pictures from one index up to another. Pictures that only earlier calls wanted are not loaded. */
    async ensure(from, to = from + 1) {
      wanted = [from, to];
      fetching ??= fetchWanted().finally(() => (fetching = null));
      await fetching;
    },

    prepend,

    /** Remove a picture. Returns a function that puts it back. */
    take(id) {
      const index = ids.has(id) ? items.findIndex((item) => item?.id === id) : -1;
      if (index < 0) return () => {};
      const [item] = items.splice(index, 1);
      ids.delete(id);
      total -= 1;
      if (index < behind) behind -= 1;
      changed();
      return () => {
        if (ended || ids.has(id)) return;
        ids.add(id);
        items.splice(index, 0, item);
        total += 1;
        if (index <= behind) behind += 1;
        changed();
      };
    },

    /** Change the fields of a picture. */
    update(id, facts) {
      const item = ids.has(id) && items.find((one) => one?.id === id);
      if (item) Object.assign(item, facts);
      changed();
    },

    end: () => (ended = true),
  };
}
