// What this browser remembers between visits. Where it may not, everything still works until the page is left.

const PREFIX = "inkstream.";

/** What was kept under a name, or `otherwise`. */
export function recollect(name, otherwise = null) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keep a value; null forgets it. */
export function keep(name, value) {
  try {
    if (value === null) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // private windows, a full disk
  }
}
