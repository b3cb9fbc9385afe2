// Favourites and deletions, told to the server and to whoever shows the picture. What is deleted can be brought back.

import { patch } from "./api.js";
import { say } from "./bus.js";
import { complain, notice } from "./notice.js";
import { t } from "./words.js";

/** Mark one picture, or take the mark away. Returns the picture as it is then. */
export async function markFavourite(id, favourite) {
  const picture = await patch(`/v1/pictures/${id}`, { favourite });
  say("marked", picture);
  return picture;
}

/** Mark all; where all are marked already, take the marks away. */
export async function markFavourites(pictures) {
  const favourite = !pictures.every((picture) => picture.favourite);
  try {
    for (const picture of pictures)
      Object.assign(picture, { favourite: (await markFavourite(picture.id, favourite)).favourite });
  } catch (error) {
    complain(error);
  }
}

/** Delete pictures, and offer to undo it. */
export async function deletePictures(pictures) {
  const gone = [];
  try {
    for (const { id } of pictures) {
      gone.push(await patch(`/v1/pictures/${id}`, { deleted: true }));
      say("deleted", id);
    }
  } catch (error) {
    complain(error);
  }
  if (gone.length) notice(t("deletedCount", { n: gone.length }), { action: [t("undo"), () => restorePictures(gone)] });
}

/** Bring deleted pictures back. */
export async function restorePictures(pictures) {
  try {
    for (const { id } of [...pictures].reverse()) {
      await patch(`/v1/pictures/${id}`, { deleted: false });
      say("restored", id);
    }
  } catch (error) {
    complain(error);
  }
}
