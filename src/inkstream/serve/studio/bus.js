// Events between parts of the page. The sender of an event does not know its listeners.

const target = new EventTarget();

/** Listen to an event: `hear("picture", (picture) => ...)`. */
export function hear(name, heard) {
  target.addEventListener(name, (event) => heard(event.detail));
}

/** Send an event. */
export function say(name, detail = null) {
  target.dispatchEvent(new CustomEvent(name, { detail }));
}
