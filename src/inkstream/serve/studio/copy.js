// A request as a command line, a curl call or Python code.

import { recollect } from "./memory.js";
import { h, icon } from "./dom.js";
import { menu } from "./menu.js";
import { notice } from "./notice.js";
import { addressOf } from "./pictures.js";
import { PICTURES } from "./wish.js";
import { t } from "./words.js";

/** Quote a text for the shell. */
const quote = (text) => (/^[\w./:=-]+$/.test(text) ? text : `'${String(text).replaceAll("'", `'\\''`)}'`);

const nameOf = (upload) => `${upload.slice("upload:".length, "upload:".length + 8)}.png`;

/** Return command lines that fetch the request's pictures from this server. */
function fetching(made) {
  const names = PICTURES.flatMap((field) => made[field] ?? []);
  const key = recollect("key") ? ` -H "Authorization: Bearer $INKSTREAM_API_KEY"` : "";
  return names.map((name) => `curl -s${key} ${location.origin}${addressOf(name)} -o ${nameOf(name)}`);
}

/** Return the command that draws a request. */
export function asCommand(made) {
  // A value that begins with a dash is written as --option=value. Otherwise it would be read as an option.
  const bound = (flag, text) => (text.startsWith("-") ? [quote(`${flag}=${text}`)] : [flag, quote(text)]);
  const words = ["inkstream", "generate", bound("--prompt", made.prompt ?? "").at(-1)];
  for (const [name, value] of Object.entries(made)) {
    if (name === "prompt" || value === null || value === false) continue;
    const flag = `--${name.replaceAll("_", "-")}`;
    if (value === true) words.push(flag);
    else for (const one of [value].flat()) words.push(...bound(flag, String(PICTURES.includes(name) ? nameOf(one) : one)));
  }
  return [...fetching(made), words.join(" ")].join("\n");
}

/** Return the curl call that queues a request on this server. */
export function asCurl(made) {
  const key = recollect("key") ? ` \\\n  -H "Authorization: Bearer $INKSTREAM_API_KEY"` : "";
  const type = "-H 'Content-Type: application/json'";
  return `curl ${location.origin}/v1/jobs${key} \\\n  ${type} \\\n  -d ${quote(JSON.stringify(made))}`;
}

/** Return Python code that draws a request with this server. */
export function asPython(made) {
  const literal = (value) => {
    if (value === true || value === false) return value ? "True" : "False";
    return Array.isArray(value) ? `[${value.map(literal).join(", ")}]` : JSON.stringify(value);
  };
  const fields = Object.entries(made).filter(([, value]) => value !== null);
  const lines = fields.map(([name, value]) => `    ${name}=${literal(value)},`);
  const key = recollect("key") ? `, os.environ["INKSTREAM_API_KEY"]` : "";
  return [
    ...(key ? ["import os", ""] : []),
    "import inkstream",
    "from inkstream.types import Done",
    "",
    `client = inkstream.Client("${location.origin}"${key})`,
    "request = inkstream.Request(",
    ...lines,
    ")",
    "for event in client.submit(request):",
    "    if isinstance(event, Done):",
    '        event.image.save(f"{event.request.seed}.png")',
  ].join("\n");
}

/** Return a button that copies a request in the chosen format. */
export function copyMenu(requestOf) {
  const button = h(
    "button",
    { type: "button", class: "icon-only", "aria-label": t("copyAs"), title: t("copyAs") },
    icon("copy"),
  );
  return menu(button, () => [
    { label: t("copyCommand"), run: () => copy(asCommand(requestOf())) },
    { label: t("copyCurl"), run: () => copy(asCurl(requestOf())) },
    { label: t("copyPython"), run: () => copy(asPython(requestOf())) },
  ]);
}

/** Copy a text to the clipboard. If the browser refuses, show the text for copying by hand. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    notice(t("copied"));
  } catch {
    const area = h("textarea", { readonly: true, rows: 8, class: "mono", "aria-label": t("copyAs") }, text);
    const dialog = h(
      "dialog",
      { class: "small" },
      h("p", {}, t("copyByHand")),
      area,
      h("form", { method: "dialog" }, h("button", {}, t("close"))),
    );
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
    area.select();
  }
}
