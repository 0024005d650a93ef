// The row of chunks under the video: what is made, what was played, where prompts took over. Draws; decides nothing.

import { byId, make } from "./dom.js";

export class Timeline {
  #cells = byId("cells");
  #marks = byId("marks");
  #chunks = []; // {element, startFrame, numFrames, made, played}
  #framesPerChunk = 1;
  #numFrames = null; // null: open-ended

  /** Begins a video of `numFrames` frames (null: open-ended). */
  begin({ numFrames, framesPerChunk }) {
    this.#framesPerChunk = framesPerChunk;
    this.#numFrames = numFrames;
    this.#chunks = [];
    this.#cells.replaceChildren();
    this.#marks.replaceChildren();
    const count = numFrames === null ? 1 : Math.ceil(numFrames / framesPerChunk);
    for (let chunk = 0; chunk < count; chunk += 1) this.#chunk(chunk);
    this.#cells.classList.toggle("open", numFrames === null);
  }

  /** Frames on the timeline now. */
  get numFrames() {
    const last = this.#chunks.at(-1);
    return last ? last.startFrame + last.numFrames : 0;
  }

  get numMade() {
    return this.#chunks.filter(({ made }) => made === 1).length;
  }

  /** Chunk `index` is made to the fraction `made`. */
  setMade(index, made) {
    const chunk = this.#chunk(index);
    if (made < chunk.made) return;
    chunk.made = made;
    chunk.element.style.setProperty("--made", made);
    chunk.element.dataset.state = made === 1 ? "ready" : "making";
  }

  /** Frames before `frame` were played. */
  setPlayed(frame) {
    for (const chunk of this.#chunks) {
      const played = Math.min(1, Math.max(0, (frame - chunk.startFrame) / chunk.numFrames));
      if (played === chunk.played) continue;
      chunk.played = played;
      chunk.element.style.setProperty("--played", played.toFixed(3));
    }
  }

  /** The video ended early: chunks that will never come leave the timeline. */
  end() {
    while (this.#chunks.length > 1 && this.#chunks.at(-1).made < 1) this.#chunks.pop().element.remove();
    this.#cells.classList.remove("open");
    this.#place();
  }

  /** Puts mark `number` at the start of a chunk; `state` is queued, applied, refused or replaced. */
  setMark(number, state, startFrame) {
    let mark = this.#marks.querySelector(`[data-number="${number}"]`);
    if (mark === null) {
      mark = make("span", { class: "mark-flag", "data-number": String(number), "aria-hidden": "true" }, String(number));
      this.#marks.append(mark);
    }
    mark.dataset.state = state;
    mark.dataset.frame = String(startFrame);
    if (startFrame >= this.numFrames) this.#chunk(Math.floor(startFrame / this.#framesPerChunk));
    this.#place();
  }

  removeMark(number) {
    this.#marks.querySelector(`[data-number="${number}"]`)?.remove();
  }

  #chunk(index) {
    while (this.#chunks.length <= index) {
      const startFrame = this.#chunks.length * this.#framesPerChunk;
      const left = this.#numFrames === null ? this.#framesPerChunk : Math.max(1, this.#numFrames - startFrame);
      const numFrames = Math.min(this.#framesPerChunk, left);
      const element = make("i", { "data-state": "waiting" });
      element.style.setProperty("flex-grow", numFrames);
      this.#cells.append(element);
      this.#chunks.push({ element, startFrame, numFrames, made: 0, played: 0 });
    }
    this.#cells.classList.toggle("dense", this.#chunks.length > 40);
    this.#place();
    return this.#chunks[index];
  }

  #place() {
    for (const mark of this.#marks.children) {
      mark.style.setProperty("--at", Math.min(1, Number(mark.dataset.frame) / Math.max(1, this.numFrames)));
    }
  }
}
