// Plays one video, from segments (MediaSource) or from an address. Knows buffers and frames; knows nothing of jobs.

const Source = globalThis.ManagedMediaSource ?? globalThis.MediaSource;
const KEEP_SECONDS = 20; // what stays behind the playhead when the browser's buffer is full

export const canPlaySegments = (mime) => Source !== undefined && (mime === null || Source.isTypeSupported(mime));

export class Player {
  #video;
  #on;
  #source = null;
  #buffer = null;
  #queue = [];
  #isComplete = false;
  #rate = 1;
  #generation = 0; // grows with each video, so that callbacks of an older one are ignored
  #shown = []; // [milliseconds, frames presented] of the last second
  #base = { total: 0, dropped: 0 }; // the element's counters when this video began

  /** `on`: firstFrame(now), position(seconds), ended(), failed(message). */
  constructor(video, on) {
    this.#video = video;
    this.#on = on;
    video.addEventListener("timeupdate", () => on.position(video.currentTime));
    video.addEventListener("ended", () => on.ended());
    video.addEventListener("error", () => {
      if (video.getAttribute("src") && video.error) on.failed(video.error.message || "The video cannot be played.");
    });
  }

  /** Begins a video of segments, at `startAt`; both in seconds, `duration` is null when it is open-ended. */
  openSegments(mime, duration, startAt = 0) {
    this.#reset();
    const source = new Source();
    this.#source = source;
    this.#video.disableRemotePlayback = true; // ManagedMediaSource asks for it
    const address = URL.createObjectURL(source);
    this.#video.src = address;
    source.addEventListener("sourceopen", () => {
      URL.revokeObjectURL(address);
      if (this.#source !== source) return;
      this.#buffer = source.addSourceBuffer(mime);
      this.#buffer.addEventListener("updateend", () => this.#pump());
      source.duration = duration ?? Infinity;
      if (startAt > 0) {
        if (duration === null) source.setLiveSeekableRange(0, startAt); // its segments are still to come
        this.#video.currentTime = startAt;
      }
      this.#pump();
    }, { once: true });
    this.#start();
  }

  append(bytes) {
    this.#queue.push(bytes);
    this.#pump();
  }

  /** No more segments will come. */
  complete() {
    this.#isComplete = true;
    this.#pump();
  }

  openUrl(address) {
    this.#reset();
    this.#video.src = address;
    this.#start();
  }

  close() {
    this.#reset();
    this.#video.removeAttribute("src");
    this.#video.load();
  }

  set rate(value) {
    this.#rate = value;
    this.#video.defaultPlaybackRate = value;
    this.#video.playbackRate = value;
  }

  get rate() {
    return this.#rate;
  }

  /** Counts of this video; `fps` is what was presented during the last second, null while nothing plays. */
  measure() {
    const quality = this.#video.getVideoPlaybackQuality();
    const now = performance.now();
    this.#shown = this.#shown.filter(([at]) => now - at < 1000);
    const [first, last] = [this.#shown.at(0), this.#shown.at(-1)];
    const isMoving = this.#shown.length > 2 && !this.#video.paused;
    return {
      decoded: Math.max(0, quality.totalVideoFrames - this.#base.total),
      dropped: Math.max(0, quality.droppedVideoFrames - this.#base.dropped),
      fps: isMoving ? ((last[1] - first[1]) * 1000) / (last[0] - first[0]) : null,
      aheadSeconds: this.#aheadSeconds(),
    };
  }

  #aheadSeconds() {
    const { buffered, currentTime } = this.#video;
    for (let i = 0; i < buffered.length; i += 1) {
      if (buffered.start(i) <= currentTime + 0.1 && currentTime <= buffered.end(i)) return buffered.end(i) - currentTime;
    }
    return 0;
  }

  #reset() {
    this.#generation += 1;
    this.#source = null;
    this.#buffer = null;
    this.#queue = [];
    this.#isComplete = false;
    this.#shown = [];
  }

  #start() {
    const quality = this.#video.getVideoPlaybackQuality();
    this.#base = { total: 0, dropped: 0 };
    const generation = this.#generation;
    this.#video.addEventListener("loadstart", () => {
      // Browsers differ in whether a new source starts the counters anew.
      const after = this.#video.getVideoPlaybackQuality();
      if (generation === this.#generation && after.totalVideoFrames >= quality.totalVideoFrames) {
        this.#base = { total: after.totalVideoFrames, dropped: after.droppedVideoFrames };
      }
    }, { once: true });
    this.#watchFrames(generation);
    this.#video.play().catch(() => {}); // refused autoplay leaves the play button
  }

  #watchFrames(generation) {
    let isFirst = true;
    if (!this.#video.requestVideoFrameCallback) {
      const seen = () => generation === this.#generation && this.#on.firstFrame(performance.now());
      this.#video.addEventListener("loadeddata", seen, { once: true });
      return;
    }
    const onFrame = (now, { presentedFrames }) => {
      if (generation !== this.#generation) return;
      if (isFirst) this.#on.firstFrame(now);
      isFirst = false;
      this.#shown.push([now, presentedFrames]);
      if (this.#shown.length > 240) this.#shown.splice(0, 120);
      this.#on.position(this.#video.currentTime);
      this.#video.requestVideoFrameCallback(onFrame);
    };
    this.#video.requestVideoFrameCallback(onFrame);
  }

  #pump() {
    const buffer = this.#buffer;
    if (buffer === null || buffer.updating || this.#source.readyState !== "open") return;
    const bytes = this.#queue.shift();
    if (bytes === undefined) {
      if (this.#isComplete) this.#source.endOfStream();
      return;
    }
    try {
      buffer.appendBuffer(bytes);
    } catch (error) {
      if (error.name !== "QuotaExceededError") return this.#on.failed(error.message);
      this.#queue.unshift(bytes);
      this.#makeRoom(buffer);
    }
  }

  #makeRoom(buffer) {
    const end = this.#video.currentTime - KEEP_SECONDS;
    if (buffer.buffered.length > 0 && end > buffer.buffered.start(0)) buffer.remove(0, end);
    else setTimeout(() => this.#pump(), 500); // nothing to give away until more was played
  }
}
