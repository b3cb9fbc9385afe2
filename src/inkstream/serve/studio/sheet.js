// The sheet of a job: all its pictures, as drafts to pick from or as a grid with titles of columns and rows.

import { get } from "./api.js";
import { hear } from "./bus.js";
import { openDialog } from "./dialog.js";
import { h, icon, iconButton } from "./dom.js";
import { complain } from "./notice.js";
import { openRefine } from "./refine.js";
import { openViewer } from "./viewer.js";
import { fieldTitle, known, t } from "./words.js";

/** Open the sheet of a job. */
export async function openSheet(id) {
  let job;
  try {
    job = await get(`/v1/jobs/${id}`);
  } catch (error) {
    complain(error);
    return;
  }
  const picked = new Map();
  const pictures = job.pictures.filter((picture) => !picture.deleted);
  const sequence = { size: () => pictures.length, idAt: (i) => pictures[i]?.id ?? null };
  const cell = (picture) => face(picture, () => openViewer(sequence, pictures.indexOf(picture)), picked, change);
  const text = h("p", { role: "status" });
  const refine = h(
    "button",
    { type: "button", class: "primary", onclick: () => (dialog.close(), openRefine([...picked.values()])) },
    icon("spark"),
    t("refine"),
  );
  const change = () => {
    text.textContent = picked.size ? t("pickedCount", { n: picked.size }) : t("pickHow");
    refine.disabled = !picked.size;
  };
  change();
  const body = job.grid ? table(job, pictures, cell) : h("div", { class: "sheet-tiles" }, pictures.map(cell));
  const title = job.note === "draft" ? t("pick") : job.grid ? t("gridOf") : t("sheet");
  const dialog = openDialog(
    "sheet",
    title,
    h("p", { class: "quiet sheet-prompt" }, job.request.prompt ?? ""),
    h("div", { class: "sheet-body" }, body),
    h("footer", {}, text, refine),
  );
}

hear("open sheet", openSheet);

function face(picture, open, picked, change) {
  const pick = iconButton(
    "check",
    t("select"),
    () => {
      if (!picked.delete(picture.id)) picked.set(picture.id, picture);
      pick.setAttribute("aria-pressed", String(picked.has(picture.id)));
      element.classList.toggle("picked", picked.has(picture.id));
      change();
    },
    { class: "icon-only corner pick", "aria-pressed": "false" },
  );
  const image = h("img", {
    src: picture.width * picture.height > 512 * 512 ? picture.thumbnail : picture.url,
    alt: picture.prompt,
    loading: "lazy",
  });
  const element = h(
    "div",
    { class: "sheet-tile" },
    h(
      "button",
      {
        type: "button",
        class: "tile-open",
        "aria-label": `${t("open")}: ${t("field.seed")} ${picture.seed}`,
        onclick: open,
      },
      image,
    ),
    pick,
  );
  return element;
}

/** Return the grid as a table. Its headings are the values of the two fields. */
function table(job, pictures, cell) {
  const { x, y } = job.grid;
  const tell = (value) => (typeof value === "string" ? known(`choice.${value}`, value) : String(value));
  const at = new Map(pictures.map((picture) => [picture.cell?.join(), picture]));
  const head = h(
    "tr",
    {},
    y ? h("td", {}) : "",
    x.values.map((value) =>
      h("th", { scope: "col" }, h("span", { class: "quiet" }, fieldTitle(x.field)), " ", tell(value)),
    ),
  );
  const rows = (y?.values ?? [null]).map((value, row) =>
    h(
      "tr",
      {},
      y ? h("th", { scope: "row" }, h("span", { class: "quiet" }, fieldTitle(y.field)), " ", tell(value)) : "",
      x.values.map((_, column) =>
        h(
          "td",
          {},
          at.has(`${column},${row}`) ? cell(at.get(`${column},${row}`)) : h("div", { class: "sheet-tile waiting" }),
        ),
      ),
    ),
  );
  const whole = h("table", { class: "sheet-grid" }, h("thead", {}, head), h("tbody", {}, rows));
  whole.style.setProperty("--rows", rows.length); // the style fits all rows into the page
  return whole;
}
