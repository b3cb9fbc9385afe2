// What helps to decide: advice on models and costs, bake-offs to vote on, and the verification of a picture.

import { get, post, withQuery } from "./api.js";
import { openDialog } from "./dialog.js";
import { h, icon } from "./dom.js";
import { menu } from "./menu.js";
import { complain } from "./notice.js";
import { duration, language, number, t } from "./words.js";

const USES = ["photos", "posters", "editing", "drafts", "variety"];

/** Return the button at the top whose list opens the advice and the bake-offs. */
export function decideMenu() {
  const button = h(
    "button",
    { type: "button", class: "quiet icon-only", id: "decide", "aria-label": t("decide"), title: t("decide") },
    icon("scales"),
  );
  return menu(button, () => [
    { label: t("adviceTitle"), icon: "spark", run: openAdvice },
    { label: t("bakeoffs"), icon: "compare", run: openBakeoffs },
  ]);
}

// Advice ------------------------------------------------------------------------------------------------------------

function openAdvice() {
  const entry = (name, label, control) => h("label", { class: "field" }, h("span", { class: "name" }, label), control);
  const use = h(
    "select",
    { name: "use" },
    USES.map((one) => h("option", { value: one }, t(`use.${one}`))),
  );
  const pictures = h("input", { name: "pictures", type: "number", min: 1, max: 1e9, value: 500, required: true });
  const card = h("input", { name: "card", maxlength: 100, placeholder: "RTX 3060, 8GiB" });
  const budget = h("input", { name: "budget", type: "number", min: 1, max: 1e9, step: "any" });
  const commercial = h("input", { name: "commercial", type: "checkbox" });
  const chinese = h("input", { name: "chinese", type: "checkbox", checked: language === "zh" });
  const result = h("div", { class: "advice", role: "status" });
  const send = h("button", { type: "submit", class: "primary" }, t("advise"));
  const form = h(
    "form",
    { class: "fields" },
    h(
      "div",
      { class: "pairs" },
      entry("use", t("adviceUse"), use),
      entry("pictures", t("advicePictures"), pictures),
      entry("card", t("adviceCard"), card),
      entry("budget", t("adviceBudget"), budget),
    ),
    h("label", { class: "tick" }, commercial, t("adviceCommercial")),
    h("label", { class: "tick" }, chinese, t("adviceChinese")),
    h("footer", {}, h("p", { class: "hint" }, t("adviceHint")), send),
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    send.disabled = true;
    result.replaceChildren(h("p", { class: "quiet" }, t("computing")));
    const asked = {
      use: use.value,
      pictures: pictures.value,
      card: card.value.trim(),
      budget: budget.value,
      commercial: commercial.checked,
      language: chinese.checked ? "zh" : "en",
    };
    try {
      result.replaceChildren(...advised(await get(withQuery("/v1/advice", asked))));
    } catch (error) {
      result.replaceChildren(h("p", { class: "bad" }, error.status ? error.message : t("noAnswer")));
    }
    send.disabled = false;
  });
  openDialog("decide", t("adviceTitle"), form, result);
}

/** Return the elements that tell an advice. */
function advised(advice) {
  const { place } = advice;
  const dollars = (amount) => `$${amount < 1 ? amount.toPrecision(2) : amount.toFixed(2)}`;
  const time = place?.seconds ? `, ${t("eachPicture", { time: duration(place.seconds) })}` : "";
  const told = place?.seconds ? ` (${place.measured || t("estimated")})` : "";
  const costs = advice.costs.toSorted((a, b) => a.month - b.month);
  return [
    h("h3", {}, advice.model),
    h("p", {}, `${advice.licence}. ${advice.why}`),
    place && h("p", {}, `${place.card}: ${place.precision}, ${place.placement}${time}${told}`),
    costs.length > 0 &&
      h(
        "table",
        {},
        h("thead", {}, h("tr", {}, [t("way"), t("aMonth"), t("aPicture")].map((one) => h("th", { scope: "col" }, one)))),
        h(
          "tbody",
          {},
          costs.map(({ way, month, each }) =>
            h("tr", {}, h("th", { scope: "row" }, way), h("td", {}, dollars(month)), h("td", {}, dollars(each))),
          ),
        ),
      ),
    details(t("arithmetic"), costs.flatMap(({ way, arithmetic }) => [h("b", {}, way), ...arithmetic])),
    details(
      t("breakEven"),
      advice.break_evens.map(({ pair, pictures }) =>
        t(pictures === null ? "never" : "cheaperFrom", { pair, n: number(Math.ceil(pictures ?? 0)) }),
      ),
    ),
    details(t("leftOut"), advice.left_out),
    details(t("sources"), [...advice.notes, ...advice.sources]),
  ].filter(Boolean);
}

const details = (title, lines) =>
  lines.length > 0 &&
  h(
    "details",
    {},
    h("summary", {}, title),
    h(
      "ul",
      {},
      lines.map((line) => h("li", {}, line)),
    ),
  );

// Bake-offs ---------------------------------------------------------------------------------------------------------

async function openBakeoffs() {
  let listed;
  try {
    listed = (await get("/v1/bakeoffs")).data;
  } catch (error) {
    complain(error);
    return;
  }
  const link = (href, text, kind) => h("a", { class: `button ${kind}`, href, target: "_blank", rel: "noopener" }, text);
  const rows = listed.map((one) =>
    h(
      "li",
      {},
      h("b", {}, one.name),
      h("span", { class: "quiet" }, t("bakeoffFacts", one)),
      h("span", { class: "row" }, link(one.vote, t("vote"), "primary"), one.report && link(one.report, t("report"), "")),
    ),
  );
  openDialog(
    "decide",
    t("bakeoffs"),
    h("p", { class: "hint" }, t("bakeoffsHint")),
    rows.length ? h("ul", { class: "bakeoffs" }, rows) : h("p", {}, t("noBakeoffs")),
  );
}

// Verification ------------------------------------------------------------------------------------------------------

/** Return a button that verifies a picture, and the place where the result is told. */
export function verifyPart(picture) {
  const result = h("div", { class: "verified", role: "status" });
  const button = h("button", { type: "button", class: "verify" }, icon("check"), t("verify"));
  button.addEventListener("click", async () => {
    button.disabled = true;
    result.replaceChildren(h("p", { class: "quiet" }, t("verifying")));
    try {
      result.replaceChildren(...verdict(await post(`/v1/pictures/${picture.id}/verify`, {})));
    } catch (error) {
      result.replaceChildren(h("p", { class: "bad" }, error.status ? error.message : t("noAnswer")));
    }
    button.disabled = false;
  });
  return { button, result };
}

function verdict(found) {
  const line = ({ line: text, right }) =>
    h("li", { class: right ? "right" : "bad" }, icon(right ? "check" : "close"), h("span", {}, text));
  const overall = found.empty && found.passed ? "verdictNothing" : found.passed ? "verdictRight" : "verdictWrong";
  const seams = found.seams.length ? t("seams", { where: found.seams.join(", ") }) : "";
  const quality = t("quality", {
    sharpness: Math.round(found.sharpness),
    dark: (100 * found.dark).toFixed(1),
    bright: (100 * found.bright).toFixed(1),
  });
  return [
    h("p", { class: found.passed ? "" : "bad" }, found.blank ? t("blank") : t(overall)),
    found.checks.length > 0 && h("ul", {}, found.checks.map(line)),
    ...[...found.notes, quality, seams].filter(Boolean).map((text) => h("p", { class: "quiet" }, text)),
  ].filter(Boolean);
}
