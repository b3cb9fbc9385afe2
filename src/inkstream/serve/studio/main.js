// Starts the studio. Jobs and pictures are on the server: the page can be closed and opened at any time.

import { get } from "./api.js";
import { hear } from "./bus.js";
import { decideMenu } from "./decide.js";
import { byId, h, icon, iconButton } from "./dom.js";
import { showForm } from "./form.js";
import { setUpGallery } from "./gallery.js";
import { follow } from "./jobs.js";
import { forgetKey, setUpKey } from "./key.js";
import { help, setUpKeyboard } from "./keyboard.js";
import { keep, recollect } from "./memory.js";
import { loadModels } from "./models.js";
import { complain, notice } from "./notice.js";
import { setUpQueue } from "./queue.js";
import { setUpDrop } from "./recall.js";
import { openSheet } from "./sheet.js";
import { setUpStage } from "./stage.js";
import { setUpViews } from "./views.js";
import { fillIn, language, switchLanguage, t } from "./words.js";

async function start() {
  fillIn();
  setUpViews();
  setUpTools();
  setUpKeyboard();
  setUpDrop();
  setUpQueue();
  await setUpKey();
  await loadModels();
  follow();
  await showForm();
  setUpStage();
  setUpGallery();
  if (recollect("key")) byId("tools").prepend(iconButton("key", t("forgetKey"), forgetKey));
  await waitForEngine();
}

/** Add the buttons for language, theme and help at the top. */
function setUpTools() {
  const dark = () =>
    (document.documentElement.dataset.theme ??
      (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const look = iconButton("moon", t("look"), () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    keep("theme", document.documentElement.dataset.theme);
    look.replaceChildren(icon(dark() ? "sun" : "moon"));
  });
  look.replaceChildren(icon(dark() ? "sun" : "moon"));
  const other = language === "zh" ? "English" : "中文";
  byId("tools").append(
    decideMenu(),
    h(
      "button",
      {
        type: "button",
        class: "quiet",
        id: "language",
        lang: language === "zh" ? "en" : "zh-CN",
        onclick: switchLanguage,
      },
      other,
    ),
    look,
    iconButton("help", t("keys"), help),
  );
}

/** Show the engine's state until it is ready. Jobs are accepted before that. */
async function waitForEngine() {
  for (;;) {
    const health = await get("/healthz").catch(() => null);
    if (health?.engine === "ready")
      return setStatus(health.model ? t("ready", { model: health.model, device: health.device ?? "" }) : "");
    setStatus(t("engineStarting"));
    await new Promise((resolve) => setTimeout(resolve, 1500));
  }
}

function setStatus(text, kind = "") {
  byId("status").textContent = text;
  byId("status").className = kind;
}

hear("online", (online) => {
  if (!online) setStatus(t("offline"), "bad");
});
hear("back", () => waitForEngine());
hear("ended", (job) => {
  waitForEngine(); // its model may have changed
  if (job.state === "failed") notice(job.error?.message ?? t("state.failed"), { kind: "error", lasting: true });
  else if (job.state === "succeeded" && job.note === "draft")
    notice(t("draftsReady"), { action: [t("pick"), () => openSheet(job.id)], lasting: true });
  else if (job.state === "succeeded" && job.grid)
    notice(t("gridReady"), { action: [t("open"), () => openSheet(job.id)] });
});

start().catch(complain);
