// What stands around the video: state, progress, prompts, measurements, errors. Shows what it is told; decides nothing.

import { byId, make, seconds, show } from "./dom.js";

const PHASES = {
  text_encode: "Reading the prompt",
  image_encode: "Reading the image",
  video_encode: "Reading the video",
  decode: "Decoding",
  mux: "Writing the video",
  store: "Storing",
};
const BADGES = { generating: "Live", paused: "Paused", reconnecting: "Reconnecting" };
const RECEIPTS = {
  sending: "sending",
  queued: "queued",
  applied: "applied",
  refused: "refused",
  replaced: "replaced by a newer one",
  unused: "not used",
};

export class Stage {
  #root = byId("stage");
  #prompts = byId("prompts");

  /** Begins a video of this shape; `prompt` is its first. */
  begin({ width, height, prompt }) {
    byId("screen").style.setProperty("--ratio", `${width} / ${height}`);
    this.#root.dataset.seen = "false";
    show(byId("stage-error"), "");
    this.warn([]);
    for (const name of ["first", "generated", "playback", "dropped", "ahead"]) this.stat(name, null);
    this.#prompts.replaceChildren();
    byId("save").hidden = true;
    if (prompt) this.prompt(1, prompt, "applied", "from the start");
    this.#prompts.hidden = true; // one prompt alone says nothing new
  }

  /** idle, connecting, queued, generating, paused, reconnecting, done, stopped or failed. */
  set state(state) {
    this.#root.dataset.state = state;
    show(byId("badge"), BADGES[state]);
  }

  get state() {
    return this.#root.dataset.state;
  }

  firstFrameSeen() {
    this.#root.dataset.seen = "true";
  }

  /** The line under the video, and over it until the first frame. */
  progress(text) {
    byId("progress").textContent = text;
    const isIdle = this.state === "idle";
    byId("veil-title").textContent = isIdle ? "Describe a scene." : text;
    byId("veil-note").textContent = isIdle ? "The first frames play while the rest is still being made." : "";
  }

  /** One line for a progress message: "Chunk 3 of 8 · stage 2 of 3 · step 1 of 2". */
  progressOf({ phase, chunk, num_chunks, stage, step, num_steps }, numStages) {
    const place = num_chunks ? `Chunk ${chunk + 1} of ${num_chunks}` : `Chunk ${chunk + 1}`;
    if (phase in PHASES) {
      this.progress(phase.endsWith("_encode") ? PHASES[phase] : `${place} · ${PHASES[phase].toLowerCase()}`);
      return;
    }
    const parts = [place];
    if (numStages > 1) parts.push(`stage ${stage + 1} of ${numStages}`);
    parts.push(`step ${step} of ${num_steps}`);
    this.progress(parts.join(" · "));
  }

  /** Adds prompt `number`, or changes its receipt. */
  prompt(number, text, state, detail = "") {
    let row = this.#prompts.querySelector(`[data-number="${number}"]`);
    if (row === null) {
      row = make("li", { "data-number": String(number) },
        make("b", { "aria-hidden": "true" }, String(number)), make("span", {}, text), make("small"));
      this.#prompts.append(row);
      this.#prompts.hidden = false;
    }
    row.dataset.state = state;
    row.lastChild.textContent = number === 1 ? detail : [RECEIPTS[state], detail].filter(Boolean).join(" · ");
  }

  stat(name, text, note = "") {
    const cell = byId(`stat-${name}`);
    const shown = text ?? "–";
    if (cell.dataset.shown === `${shown}|${note}`) return;
    cell.dataset.shown = `${shown}|${note}`;
    cell.replaceChildren(...(note ? [`${shown} `, make("small", {}, note)] : [shown]));
  }

  error(text) {
    show(byId("stage-error"), text);
  }

  /** `warnings` of the server: [{param, message}]. */
  warn(warnings) {
    const list = byId("warnings");
    list.hidden = warnings.length === 0;
    list.replaceChildren(...warnings.map(({ param, message }) => make("li", {}, param ? `${param}: ${message}` : message)));
  }

  save(address, id) {
    const link = byId("save");
    link.href = address;
    link.download = `${id}.mp4`;
    link.hidden = false;
  }

  /** For screen readers: only what a listener wants to hear. */
  announce(text) {
    byId("announce").textContent = text;
  }

  clock(position, duration) {
    byId("clock").textContent = duration > 0 ? `${position.toFixed(1)} / ${seconds(duration)}` : seconds(position);
  }
}
