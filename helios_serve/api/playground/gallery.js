// Past and running jobs: thumbnails, play, download, delete, and what can be made from them.

import * as api from "./api.js";
import { ago, byId, icon, make, plural } from "./dom.js";

const PAGE = 12;
const REFRESH_MS = 4000; // while a job is unfinished
const CONFIRM_MS = 4000;

export class Gallery {
  #on;
  #videos = [];
  #cards = new Map(); // id -> {element, stamp}
  #hasMore = false;
  #timer = null;
  #runs = 0;

  /** `on`: play(video), extend(video), start(file), deleted(id). */
  constructor(on) {
    this.#on = on;
    byId("gallery-more").addEventListener("click", () => this.#load(this.#videos.length + PAGE));
  }

  refresh() {
    return this.#load(Math.max(PAGE, this.#videos.length));
  }

  async #load(count) {
    clearTimeout(this.#timer);
    this.#runs += 1;
    const run = this.#runs;
    try {
      const { videos, hasMore } = await list(count);
      if (run !== this.#runs) return;
      this.#videos = videos;
      this.#hasMore = hasMore;
      byId("gallery-error").textContent = "";
      this.#draw();
    } catch (error) {
      if (!(error instanceof api.ApiError)) throw error;
      if (error.status !== 401) byId("gallery-error").textContent = error.message;
    }
    if (run === this.#runs && this.#videos.some(isRunning)) this.#timer = setTimeout(() => this.refresh(), REFRESH_MS);
  }

  #draw() {
    const ids = new Set(this.#videos.map(({ id }) => id));
    for (const id of this.#cards.keys()) if (!ids.has(id)) this.#cards.delete(id);
    const elements = this.#videos.map((video) => {
      const stamp = JSON.stringify([video.status, video.progress, video.helios.state, video.helios.chunks_done > 0]);
      const known = this.#cards.get(video.id);
      if (known?.stamp === stamp) return known.element;
      const element = this.#card(video);
      this.#cards.set(video.id, { element, stamp });
      return element;
    });
    const grid = byId("gallery");
    // Only what changed is moved, so that focus and pictures stay.
    if (elements.some((element, i) => grid.children[i] !== element) || grid.children.length !== elements.length) {
      const focused = document.activeElement;
      grid.replaceChildren(...elements);
      if (grid.contains(focused)) focused.focus();
    }
    byId("gallery-empty").hidden = this.#videos.length > 0;
    byId("gallery-more").hidden = !this.#hasMore;
  }

  #card(video) {
    const isPlayable = video.status === "completed" || isRunning(video);
    const thumb = make("button", {
      type: "button", class: "thumb", disabled: !isPlayable,
      "aria-label": `Play: ${video.prompt}`, click: () => this.#act(() => this.#play(video.id)),
    });
    if (video.helios.chunks_done > 0 || video.status === "completed") {
      const image = make("img", { alt: "", loading: "lazy", src: api.contentUrl(video, "thumbnail") });
      image.addEventListener("error", () => image.remove());
      thumb.append(image);
    }
    if (isRunning(video)) {
      const bar = make("span", { class: "thumb-bar" });
      bar.style.setProperty("--done", video.progress / 100);
      thumb.append(make("span", { class: "thumb-state" }, stateOf(video)), bar);
    } else if (video.status === "failed") {
      thumb.append(make("span", { class: "thumb-state" }, stateOf(video)));
    }
    return make("li", { class: "card", "data-id": video.id, "data-status": video.status },
      thumb,
      make("p", { class: "card-prompt", title: video.prompt }, video.prompt),
      make("p", { class: "card-note" }, noteOf(video)),
      make("div", { class: "card-actions" }, ...this.#actions(video)));
  }

  #actions(video) {
    const isDone = video.status === "completed";
    const named = (label) => ({ class: "icon-button", title: label, "aria-label": `${label}: ${video.prompt}` });
    const button = (name, label, act) =>
      make("button", { type: "button", ...named(label), click: () => this.#act(act) }, icon(name));
    const actions = [];
    if (isDone) {
      actions.push(
        make("a", { ...named("Download"), href: api.contentUrl(video), download: `${video.id}.mp4` }, icon("down")),
        button("extend", "Extend", () => this.#on.extend(video)),
        button("frame", "Use last frame", async () => this.#on.start(await api.lastFrame(video.id))),
      );
    }
    actions.push(this.#deleteButton(video));
    return actions;
  }

  #deleteButton(video) {
    const label = `Delete: ${video.prompt}`;
    const look = { class: "icon-button delete", title: "Delete", "aria-label": label };
    const button = make("button", { type: "button", ...look }, icon("trash"));
    const calm = () => {
      button.classList.remove("asking");
      button.replaceChildren(icon("trash"));
    };
    button.addEventListener("click", () => {
      if (!button.classList.contains("asking")) {
        button.classList.add("asking");
        button.replaceChildren("Delete?");
        setTimeout(calm, CONFIRM_MS);
        return;
      }
      this.#act(async () => {
        await api.deleteVideo(video.id);
        this.#on.deleted(video.id);
        await this.refresh();
      });
    });
    button.addEventListener("blur", calm);
    return button;
  }

  async #play(id) {
    const { video } = await api.getVideo(id); // fresh: signed addresses expire
    this.#on.play(video);
  }

  async #act(action) {
    byId("gallery-error").textContent = "";
    try {
      await action();
    } catch (error) {
      if (!(error instanceof api.ApiError)) throw error;
      byId("gallery-error").textContent = error.message;
      if (error.status === 404) await this.refresh();
    }
  }
}

async function list(count) {
  const videos = [];
  let hasMore = true;
  while (hasMore && videos.length < count) {
    const page = await api.listVideos({ after: videos.at(-1)?.id ?? null, limit: Math.min(100, count - videos.length) });
    videos.push(...page.data);
    hasMore = page.has_more && page.data.length > 0;
  }
  return { videos, hasMore };
}

const isRunning = (video) => video.status === "queued" || video.status === "in_progress";

function stateOf({ status, progress, helios, error }) {
  if (status === "queued") return helios.queue_position > 0 ? `Queued, ${helios.queue_position}` : "Queued";
  if (status === "in_progress") return `${progress} %`;
  if (helios.state === "cancelled" || error?.code === "cancelled") return "Cancelled";
  return "Failed";
}

function noteOf(video) {
  if (video.helios.state === "expired") return "Expired";
  if (video.status === "failed" && video.error?.code !== "cancelled") return video.error?.message ?? "Failed";
  const length = video.seconds ? `${Number(Number(video.seconds).toFixed(1))} s` : plural(video.helios.num_frames, "frame");
  return `${length} · ${video.size.replace("x", " × ")} · ${ago(video.created_at)}`;
}
