// The playground: puts its parts together. Everything it does goes through the public API.

import { access, ApiError, clearKey, hasKey, listModels, setKey } from "./api.js";
import { Composer } from "./composer.js";
import { byId, setIcon } from "./dom.js";
import { Gallery } from "./gallery.js";
import { takeKept } from "./kept.js";
import { Live } from "./live.js";

let model = null;

const composer = new Composer({
  onSubmit: (wanted) => {
    live.generate(wanted);
    composer.extend(null);
    byId("stage").scrollIntoView({ block: "nearest" });
  },
  onPlan: (plan) => live.preview(plan),
});

const gallery = new Gallery({
  play: (video) => live.show(video, model.helios.frames_per_chunk, model.helios.num_stages),
  extend: (video) => composer.extend(video),
  start: (file) => {
    composer.extend(null);
    composer.setMedia(file);
    byId("prompt").focus();
  },
  deleted: (id) => live.isShowing(id) && live.close(),
});

const live = new Live({
  jobsChanged: () => gallery.refresh(),
  refused: (error) => composer.showError(error),
  busy: (isBusy) => {
    byId("generate").textContent = isBusy ? "Stop and generate anew" : "Generate";
    byId("generate").classList.toggle("quiet", isBusy);
  },
});

byId("change").addEventListener("submit", (event) => {
  event.preventDefault();
  const input = byId("change-prompt");
  const text = input.value.trim();
  byId("change-error").textContent = text === "" ? "Say what should change." : "";
  if (text === "") return;
  live.change(text, Number(byId("change-blend").value));
  input.value = "";
});

async function start() {
  try {
    const { data } = await listModels();
    model = data[0];
    byId("model-name").textContent = model.id;
    byId("access").hidden = true;
    composer.offer(model);
    const kept = takeKept();
    if (kept !== null) live.resume(kept);
    await gallery.refresh();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) return; // the field for the key is open
    byId("form-error").textContent = error.message;
    byId("form-error").hidden = false;
    setTimeout(start, 3000);
  }
}

access.addEventListener("required", ({ detail }) => {
  byId("access").hidden = false;
  byId("access-error").textContent = hasKey() ? detail.message : "";
  clearKey();
  byId("access-key").focus();
});

byId("access-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("access-key").value.trim());
  byId("access-key").value = "";
  start();
});

function bindTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const draw = () => setIcon(byId("theme"), isDark() ? "sun" : "moon", isDark() ? "Switch to light" : "Switch to dark");
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem("helios.theme", root.dataset.theme);
    draw();
  });
  system.addEventListener("change", draw);
  draw();
}

bindTheme();
start();
