// How fast the server generates, seen from here. Knows arrival times; knows nothing of sockets.

const WINDOW = 4; // segments

/** Frames per second of generation without the time in which the server waited for our credit. */
export class GenerationRate {
  #segments = []; // {frames, ms}
  #lastAt = null;
  #creditAt = -Infinity;

  /** Credit was given or generation resumed: time before this moment was waiting if nothing was in the works. */
  credit(now, isWaiting) {
    if (isWaiting) this.#creditAt = now;
  }

  segment(now, frames) {
    if (this.#lastAt !== null) this.#segments.push({ frames, ms: now - Math.max(this.#lastAt, this.#creditAt) });
    if (this.#segments.length > WINDOW) this.#segments.shift();
    this.#lastAt = now;
  }

  /** null until two segments have arrived. */
  get fps() {
    const ms = this.#segments.reduce((sum, segment) => sum + segment.ms, 0);
    const frames = this.#segments.reduce((sum, segment) => sum + segment.frames, 0);
    return ms > 0 ? (frames * 1000) / ms : null;
  }
}
