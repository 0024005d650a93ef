// Follows a job that runs without a session. Knows polling and the event stream; knows nothing of the page.

import { eventsUrl, getVideo } from "./api.js";

const isOver = (video) => video.status === "completed" || video.status === "failed";

/** Follows `video` until it ends. `on`: update(video), progress(message), failed(error). */
export class JobWatch {
  #on;
  #events = null;
  #isClosed = false;

  constructor(video, on) {
    this.#on = on;
    if (!isOver(video)) this.#listen(video);
    this.#poll(video);
  }

  close() {
    this.#isClosed = true;
    this.#events?.close();
  }

  // Steps come only as events; what counts (state, chunks, end) is polled, which survives any proxy.
  #listen(video) {
    this.#events = new EventSource(eventsUrl(video));
    this.#events.addEventListener("video_generation.progress", ({ data }) => this.#on.progress(JSON.parse(data)));
    for (const name of ["video_generation.completed", "error"]) {
      this.#events.addEventListener(name, () => this.#events.close());
    }
  }

  async #poll(video) {
    while (!this.#isClosed) {
      this.#on.update(video);
      if (isOver(video)) break;
      try {
        const answer = await getVideo(video.id);
        video = answer.video;
        if (!isOver(video)) await new Promise((resolve) => setTimeout(resolve, answer.pollAfterMs));
      } catch (error) {
        if (!this.#isClosed) this.#on.failed(error);
        break;
      }
    }
    this.#events?.close();
  }
}
