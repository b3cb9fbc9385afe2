// Favourites and deletions: calls of the server, and events for modules that show the picture. Deletions can be undone.

import { patch } from "./api.js";
import { say } from "./bus.js";
import { complain, notice } from "./notice.js";
import { t } from "./words.js";

/** Set or clear a picture's favourite mark. Returns the changed picture. */
export async function markFavourite(id, favourite) {
  const picture = await patch(`/v1/pictures/${id}`, { favourite });
  say("marked", picture);
  return picture;
}

/** Mark all pictures as favourites. If all are marked already, clear the marks. */
export async function markFavourites(pictures) {
  const favourite = !pictures.every((picture) => picture.favourite);
  try {
    for (const picture of pictures)
      Object.assign(picture, { favourite: (await markFavourite(picture.id, favourite)).favourite });
  } catch (error) {
    complain(error);
  }
}

/** Delete pictures and show a notice with an undo button. */
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

/** Restore deleted pictures. */
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
