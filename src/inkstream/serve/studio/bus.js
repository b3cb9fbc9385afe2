// Words that parts of the page say to each other. Who says one does not know who hears it.

const target = new EventTarget();

/** Hear a word: `hear("picture", (picture) => ...)`. */
export function hear(name, heard) {
  target.addEventListener(name, (event) => heard(event.detail));
}

/** Say one. */
export function say(name, detail = null) {
  target.dispatchEvent(new CustomEvent(name, { detail }));
}
