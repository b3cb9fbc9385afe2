// The page's texts in the user's language. A missing text is in English.

import { keep } from "./memory.js";
import { en } from "./words.en.js";
import { zh } from "./words.zh.js";

const LANGUAGES = { en, zh };

/** `en` or `zh`: the chosen language, or else the browser's. */
export const language = document.documentElement.lang.startsWith("zh") ? "zh" : "en";

/** Return a text by its name. Each {key} in it is replaced by a value. */
export function t(name, values = {}) {
  const text = LANGUAGES[language][name] ?? en[name] ?? name;
  return text.replace(/\{(\w+)\}/g, (whole, key) => values[key] ?? whole);
}

/** Return a text by its name, or `otherwise` if there is none. */
export const known = (name, otherwise) =>
  LANGUAGES[language][name] ?? (language === "en" ? otherwise : (en[name] ?? otherwise));

/** Return a field's title. */
export const fieldTitle = (name) =>
  known(`field.${name}`, name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " "));

/** Switch to the other language. The page reloads; its state is stored in the browser and on the server. */
export function switchLanguage() {
  keep("language", language === "zh" ? "en" : "zh");
  location.reload();
}

/** Fill the texts of the page's markup. data-t: name of a text; data-t-label: name of a label for screen readers. */
export function fillIn(root = document) {
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of root.querySelectorAll("[data-t-label]"))
    element.setAttribute("aria-label", t(element.dataset.tLabel));
}

/** Return a duration as text: 8 s, 3 min, 2 h 5 min. */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return t("seconds", { n: whole });
  const minutes = Math.round(whole / 60);
  if (minutes < 60) return t("minutes", { n: minutes });
  return t("hours", { h: Math.floor(minutes / 60), m: minutes % 60 });
}

/** Return a time as text. The date is left out if it is today. */
export function moment(unix) {
  const date = new Date(unix * 1000);
  const today = date.toDateString() === new Date().toDateString();
  const style = today ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" };
  return new Intl.DateTimeFormat(document.documentElement.lang, style).format(date);
}

/** Return a number with thousands separators. */
export const number = (value) => new Intl.NumberFormat(document.documentElement.lang).format(value);

/** Return a number of pictures as text. */
export const pictureCount = (count) => t(count === 1 ? "onePicture" : "pictureCount", { n: number(count) });

/** Return a number of bytes as text. */
export function size(bytes) {
  return bytes < 1 << 20 ? `${Math.max(1, Math.round(bytes / 1024))} KB` : `${(bytes / (1 << 20)).toFixed(1)} MB`;
}
