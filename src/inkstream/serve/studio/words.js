// Everything the page says, in the reader's language. English where a word is missing.

import { keep } from "./memory.js";
import { en } from "./words.en.js";
import { zh } from "./words.zh.js";

const LANGUAGES = { en, zh };

/** `en` or `zh`: what was chosen, else the browser's. */
export const language = document.documentElement.lang.startsWith("zh") ? "zh" : "en";

/** A text by its name, with values in place of {name}. */
export function t(name, values = {}) {
  const text = LANGUAGES[language][name] ?? en[name] ?? name;
  return text.replace(/\{(\w+)\}/g, (whole, key) => values[key] ?? whole);
}

/** The text of that name, or what is given where there is none. */
export const known = (name, otherwise) =>
  LANGUAGES[language][name] ?? (language === "en" ? otherwise : (en[name] ?? otherwise));

/** A field's name as people say it; other languages have words for those that are known. */
export const fieldTitle = (name) =>
  known(`field.${name}`, name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " "));

/** Speak the other language. The page starts anew: all that matters is kept, here or on the server. */
export function switchLanguage() {
  keep("language", language === "zh" ? "en" : "zh");
  location.reload();
}

/** Fill in the words of the page's own markup: data-t is text, data-t-label a name for screen readers. */
export function fillIn(root = document) {
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of root.querySelectorAll("[data-t-label]"))
    element.setAttribute("aria-label", t(element.dataset.tLabel));
}

/** Seconds in words: 8 s, 3 min, 2 h 5 min. */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return t("seconds", { n: whole });
  const minutes = Math.round(whole / 60);
  if (minutes < 60) return t("minutes", { n: minutes });
  return t("hours", { h: Math.floor(minutes / 60), m: minutes % 60 });
}

/** A moment: the time of today, else the date as well. */
export function moment(unix) {
  const date = new Date(unix * 1000);
  const today = date.toDateString() === new Date().toDateString();
  const style = today ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" };
  return new Intl.DateTimeFormat(document.documentElement.lang, style).format(date);
}

/** A whole number with its separators. */
export const number = (value) => new Intl.NumberFormat(document.documentElement.lang).format(value);

/** So many pictures, in words. */
export const pictureCount = (count) => t(count === 1 ? "onePicture" : "pictureCount", { n: number(count) });

/** Bytes in words. */
export function size(bytes) {
  return bytes < 1 << 20 ? `${Math.max(1, Math.round(bytes / 1024))} KB` : `${(bytes / (1 << 20)).toFixed(1)} MB`;
}
