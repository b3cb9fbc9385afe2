// Values that the browser stores between visits. If it cannot store them, they last until the page is left.

const PREFIX = "inkstream.";

/** Return the value stored under a name, or `otherwise`. */
export function recollect(name, otherwise = null) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Store a value; null removes it. */
export function keep(name, value) {
  try {
    if (value === null) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // a private window or a full disk
  }
}
