// The prompts of a session and their receipts: sent, queued, applied. Knows marks and rows; sends nothing.

import { byId, seconds } from "./dom.js";

export class PromptChanges {
  #stage;
  #timeline;
  #plan = null;
  #changes = new Map(); // event id -> {number, text, state}

  constructor(stage, timeline) {
    this.#stage = stage;
    this.#timeline = timeline;
  }

  begin(plan) {
    this.#plan = plan;
    this.#changes.clear();
  }

  /** [[event id, prompt]] of those that were not refused. */
  get list() {
    return [...this.#changes].filter(([, { state }]) => state !== "refused").map(([id, { text }]) => [id, text]);
  }

  sent(id, text) {
    const change = { number: this.#changes.size + 2, text, state: "sending" }; // 1 is the prompt of the start
    this.#changes.set(id, change);
    byId("prompts").hidden = false;
    this.#stage.prompt(change.number, text, "sending");
  }

  queued({ event_id: id, earliest_chunk: chunk }) {
    const change = this.#changes.get(id);
    if (change === undefined || change.state !== "sending") return;
    change.state = "queued";
    const isKnown = typeof chunk === "number";
    const frame = isKnown ? chunk * this.#plan.framesPerChunk : this.#timeline.numFrames;
    this.#stage.prompt(change.number, change.text, "queued", isKnown ? `from chunk ${chunk + 1}` : "");
    this.#timeline.setMark(change.number, "queued", frame);
  }

  applied({ event_id: id, chunk, start_frame: frame }) {
    const change = this.#changes.get(id);
    if (change === undefined || change.state === "applied") return;
    change.state = "applied";
    const place = `chunk ${chunk + 1} · frame ${frame} · ${seconds(frame / this.#plan.fps)}`;
    this.#stage.prompt(change.number, change.text, "applied", place);
    this.#stage.announce(`Prompt applied at chunk ${chunk + 1}.`);
    this.#timeline.setMark(change.number, "applied", frame);
    for (const older of this.#changes.values()) {
      if (older.number < change.number && isWaiting(older)) this.#drop(older, "replaced");
    }
  }

  /** false when `id` is not one of our changes. */
  refused(id, error) {
    const change = this.#changes.get(id);
    if (change === undefined) return false;
    this.#drop(change, "refused", error.message);
    return true;
  }

  /** The session is over: what was not applied never will be. */
  settle() {
    for (const change of this.#changes.values()) if (isWaiting(change)) this.#drop(change, "unused");
  }

  #drop(change, state, detail = "") {
    change.state = state;
    this.#stage.prompt(change.number, change.text, state, detail);
    this.#timeline.removeMark(change.number);
  }
}

const isWaiting = ({ state }) => state === "sending" || state === "queued";
