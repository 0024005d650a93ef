// The controls of playback: play, position, full screen. Knows the video element; knows nothing of how it is filled.

import { byId, setIcon } from "./dom.js";

export class Transport {
  #video;
  #seek = byId("seek");

  /** `replay()` is asked when an ended video is played again; true when it took care of that. */
  constructor(video, replay) {
    this.#video = video;
    const toggle = () => {
      if (!video.hasAttribute("src") || (video.ended && replay())) return;
      if (video.paused) video.play().catch(() => {});
      else video.pause();
    };
    byId("play").addEventListener("click", toggle);
    video.addEventListener("click", toggle);
    byId("full").addEventListener("click", () => video.requestFullscreen?.());
    this.#seek.addEventListener("input", () => this.#jump(Number(this.#seek.value)));
  }

  /** Shows which controls work; `duration` in seconds. */
  update(duration, isSeekable) {
    const hasVideo = this.#video.hasAttribute("src");
    byId("play").disabled = byId("full").disabled = !hasVideo;
    this.#seek.disabled = !hasVideo || !isSeekable;
    this.#seek.max = String(duration);
    const isStill = this.#video.paused || this.#video.ended;
    setIcon(byId("play"), isStill ? "play" : "pause", isStill ? "Play" : "Pause playback");
  }

  moved(position, duration) {
    if (!this.#seek.matches(":active")) this.#seek.value = String(position);
    this.#seek.setAttribute("aria-valuetext", `${position.toFixed(1)} of ${duration.toFixed(1)} seconds`);
  }

  // A file can be sought anywhere; of segments only those that are in the buffer can be shown.
  #jump(position) {
    const { buffered, seekable, duration } = this.#video;
    const isLive = this.#video.src.startsWith("blob:");
    const ranges = isLive ? buffered : seekable;
    if (ranges.length === 0) return;
    const end = isLive ? ranges.end(ranges.length - 1) - 0.01 : duration;
    this.#video.currentTime = Math.max(ranges.start(0), Math.min(position, end));
  }
}
