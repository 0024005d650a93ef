// One video on the stage, from the request to the last frame. Joins session or job, player, timeline and stage.

import * as api from "./api.js";
import { PromptChanges } from "./changes.js";
import { byId, plural } from "./dom.js";
import { JobWatch } from "./job.js";
import { keep } from "./kept.js";
import { mimeOf, startsWithInit } from "./mp4.js";
import { canPlaySegments, Player } from "./player.js";
import { GenerationRate } from "./rate.js";
import { Session } from "./session.js";
import { Stage } from "./stage.js";
import { Timeline } from "./timeline.js";
import { Transport } from "./transport.js";

const MAX_AHEAD_SEGMENTS = 2;
const DRAW_MS = 90;
const ACTIVE = ["connecting", "queued", "generating", "paused", "reconnecting"];

export class Live {
  #video = byId("video");
  #stage = new Stage();
  #timeline = new Timeline();
  #player;
  #transport;
  #on;
  #plan = null; // {width, height, fps, numFrames, framesPerChunk, numStages, prompt}
  #session = null;
  #watch = null;
  #startedAt = 0;
  #firstFrameMs = null;
  #mime = null;
  #segments = []; // {index, startFrame, endSeconds}
  #acked = -1;
  #rate = new GenerationRate();
  #changes;
  #replayUrl = null; // where the finished file is, once a progressive stream has ended
  #isSeekable = false;
  #startAt = 0; // seconds
  #isWaiting = false; // the server begins no further chunk on our credit
  #chunk = 0; // in the works
  #drawnAt = 0;

  /** `on`: jobsChanged(), refused(error) for what the form should show, busy(isActive). */
  constructor(on) {
    this.#on = on;
    this.#changes = new PromptChanges(this.#stage, this.#timeline);
    this.#player = new Player(this.#video, {
      firstFrame: (now) => this.#firstFrame(now),
      position: () => this.#moved(),
      ended: () => this.#moved(),
      failed: (message) => this.#playbackFailed(message),
    });
    this.#transport = new Transport(this.#video, () => this.#replay());
    byId("pause").addEventListener("click", () => this.#togglePause());
    byId("stop").addEventListener("click", () => this.#stop());
    addEventListener("pagehide", () => this.#keep());
    setInterval(() => this.#measure(), 250);
  }

  get isActive() {
    return ACTIVE.includes(this.#stage.state);
  }

  /** Generates and plays. `request` has the fields of the API; `extend` is the id of a video to continue, or null. */
  async generate({ request, plan, extend }) {
    this.#begin(plan);
    this.#state("connecting", "Connecting");
    if (extend !== null) {
      await this.#createJob(() => api.extendVideo({ ...request, video: { id: extend } }));
    } else if (canPlaySegments(null)) {
      const session = new Session({ ...request, max_ahead_segments: MAX_AHEAD_SEGMENTS }, this.#sessionEvents(request));
      this.#session = session;
      await session.open();
    } else {
      await this.#createJob(() => api.createVideo({ ...request, partial_videos: 0 }));
    }
  }

  /** Goes on with what `#keep` kept before the page was loaded again. */
  async resume({ id, plan, changes, position }) {
    this.#begin(plan);
    for (const [eventId, text] of changes) this.#changes.sent(eventId, text);
    this.#startAt = position;
    this.#state("connecting", "Connecting");
    const failed = (error) => (this.#segments.length > 0 ? this.#failed(error) : this.close()); // it is gone
    this.#session = new Session(null, { ...this.#sessionEvents(null), failed }, id);
    await this.#session.open();
  }

  /** Plays a job of the gallery, finished or running. */
  show(video, framesPerChunk, numStages) {
    const [width, height] = video.size.split("x").map(Number);
    const { fps, num_frames: numFrames } = video.helios;
    this.#begin({ width, height, fps, numFrames, framesPerChunk, numStages, prompt: video.prompt });
    this.#follow(video);
    byId("stage").scrollIntoView({ block: "nearest" });
  }

  /** Shows the chunks that the form would ask for, while the stage is empty. */
  preview(plan) {
    if (this.#stage.state === "idle") this.#timeline.begin(plan);
  }

  /** Whether `id` is on the stage now. */
  isShowing(id) {
    return this.#session?.id === id || this.#plan?.id === id;
  }

  close() {
    this.#leave();
    this.#player.close();
    this.#state("idle", "Ready");
  }

  #begin(plan) {
    this.#leave();
    this.#plan = plan;
    this.#startedAt = performance.now();
    this.#firstFrameMs = null;
    this.#mime = null;
    this.#segments = [];
    this.#acked = -1;
    this.#rate = new GenerationRate();
    this.#changes.begin(plan);
    this.#replayUrl = null;
    this.#isSeekable = false;
    this.#startAt = 0;
    this.#isWaiting = false;
    this.#chunk = 0;
    this.#player.close();
    this.#player.rate = 1;
    this.#stage.begin(plan);
    this.#timeline.begin(plan);
  }

  #leave() {
    if (this.#session !== null && this.isActive) this.#session.stop();
    this.#session?.abandon();
    this.#watch?.close();
    this.#session = null;
    this.#watch = null;
  }

  #keep() {
    if (this.#session?.id == null || !this.isActive) return;
    keep({ id: this.#session.id, plan: this.#plan, changes: this.#changes.list, position: this.#video.currentTime });
  }

  #state(state, text) {
    this.#stage.state = state;
    if (text !== undefined) this.#stage.progress(text);
    const isSession = this.#session?.id != null;
    byId("pause").hidden = !isSession || !["generating", "paused"].includes(state);
    byId("pause").textContent = state === "paused" ? "Resume" : "Pause";
    byId("stop").hidden = !["queued", "generating", "paused"].includes(state);
    byId("change").hidden = !isSession || !["queued", "generating", "paused"].includes(state);
    this.#on.busy(this.isActive);
  }

  // --- a session ---

  #sessionEvents(request) {
    return {
      start: (message) => this.#sessionStarted(message),
      segment: (metadata, bytes) => this.#segment(metadata, bytes),
      queued: (message) => this.#changes.queued(message),
      applied: (message) => this.#changes.applied(message),
      refused: (id, error) => this.#changes.refused(id, error) || this.#stage.error(error.message),
      progress: (message) => this.#progress(message),
      state: (message) => this.#sessionState(message),
      lost: () => this.#state("reconnecting", "Connection lost, reconnecting"),
      resumed: () => this.#state("generating", "Connected again"),
      done: (message) => this.#sessionDone(message),
      failed: (error) => this.#failed(error),
      unavailable: () => {
        this.#session = null;
        this.#createJob(() => api.createVideo({ ...request, partial_videos: 0 }));
      },
    };
  }

  #sessionStarted({ config = {}, mime_type: mime, recommended_playback_rate: rate }) {
    this.#mime = mime?.includes("codecs") ? mime : null;
    if (config.fps) this.#plan.fps = config.fps;
    if (config.num_frames && config.num_frames !== this.#plan.numFrames) {
      this.#plan.numFrames = config.num_frames;
      this.#timeline.begin(this.#plan);
    }
    this.#playbackRate(rate);
    this.#state("queued", "Waiting for the first chunk");
    this.#on.jobsChanged();
  }

  #segment(metadata, bytes) {
    const { generation_chunk_index: chunk, num_frames: numFrames, start_frame: startFrame } = metadata;
    if (this.#segments.length === 0) this.#openSegments(bytes);
    this.#segments.push({
      index: metadata.transport_chunk_index,
      endSeconds: (startFrame + numFrames) / this.#plan.fps,
    });
    this.#player.append(bytes);
    this.#rate.segment(performance.now(), numFrames);
    this.#timeline.setMade(chunk, 1);
    if (this.#stage.state === "queued") this.#state("generating");
    if (this.#stage.state === "generating" && this.#isAhead) this.#stage.progress("Ahead of playback, waiting");
    this.#giveCredit();
  }

  /** All that our credit allows has arrived, and more is to come. */
  get #isAhead() {
    const last = this.#segments.at(-1);
    if (!this.#isWaiting || last === undefined || last.index < this.#chunk) return false;
    const { numFrames, fps } = this.#plan;
    return numFrames === null || last.endSeconds < numFrames / fps;
  }

  #openSegments(bytes) {
    const mime = this.#mime ?? (startsWithInit(bytes) ? mimeOf(bytes) : null);
    const { numFrames, fps } = this.#plan;
    if (mime !== null && canPlaySegments(mime)) {
      this.#player.openSegments(mime, numFrames === null ? null : numFrames / fps, this.#startAt);
      this.#isSeekable = true;
    } else {
      this.#failed(new api.ApiError({ message: `This browser cannot play ${mime ?? "these segments"}.` }));
    }
  }

  #sessionState({ state, queue_position: position, recommended_playback_rate: rate }) {
    this.#playbackRate(rate);
    this.#isWaiting = state === "waiting_for_credit";
    if (state === "queued") this.#state("queued", position > 0 ? `In the queue, position ${position}` : "In the queue");
    else if (state === "paused") this.#state("paused", "Paused. The server ends a paused session after a minute.");
    else if (state === "generating" && this.#stage.state === "paused") this.#state("generating", "Going on");
  }

  #sessionDone({ stopped, video }) {
    this.#player.complete();
    this.#changes.settle();
    this.#timeline.end();
    const frames = plural(video?.helios?.usage?.num_frames ?? this.#numFrames(), "frame");
    this.#state(stopped ? "stopped" : "done", stopped ? `Stopped after ${frames}` : `Done, ${frames}`);
    this.#stage.announce(stopped ? "Stopped." : "The video is done.");
    this.#finishedJob(video);
    this.#on.jobsChanged();
  }

  #giveCredit() {
    const session = this.#session;
    if (session === null || this.#segments.length === 0) return;
    // A finite video is finished although nobody watches; an open-ended one waits for its viewer.
    const isUnwatched = this.#plan.numFrames !== null && (this.#video.paused || document.hidden);
    const now = this.#video.currentTime + 0.5 / this.#plan.fps;
    const played = isUnwatched ? this.#segments.at(-1) : this.#segments.findLast(({ endSeconds }) => endSeconds <= now);
    if (played === undefined || played.index <= this.#acked) return;
    this.#rate.credit(performance.now(), this.#segments.at(-1).index - this.#acked >= MAX_AHEAD_SEGMENTS);
    this.#acked = played.index;
    session.ack(played.index, this.#player.measure().aheadSeconds);
  }

  /** Sends a new prompt to the running session. */
  change(text, transitionChunks) {
    this.#changes.sent(this.#session.change(text, transitionChunks), text);
  }

  // --- a job without a session ---

  async #createJob(create) {
    const plan = this.#plan;
    try {
      const video = await create();
      if (plan !== this.#plan) return;
      const { fps, num_frames: numFrames } = video.helios;
      const [width, height] = video.size.split("x").map(Number);
      Object.assign(plan, { fps, numFrames, width, height });
      this.#timeline.begin(plan);
      this.#on.jobsChanged();
      this.#follow(video);
    } catch (error) {
      if (!(error instanceof api.ApiError)) throw error;
      if (plan === this.#plan) this.#failed(error);
    }
  }

  #follow(video) {
    this.#plan.id = video.id;
    const isFinished = video.status === "completed";
    if (isFinished) this.#openFile(video);
    else if (video.status !== "failed") this.#player.openUrl(api.streamUrl(video));
    this.#watch = new JobWatch(video, {
      update: (job) => this.#jobUpdate(job, isFinished),
      progress: (message) => this.#progress(message),
      failed: (error) => this.#failed(error),
    });
  }

  #jobUpdate(video, wasFinished) {
    const { helios } = video;
    const made = video.status === "completed" ? helios.num_chunks : helios.chunks_done;
    const numNew = made - this.#timeline.numMade; // polling may find several at once
    if (numNew > 0 && !wasFinished) this.#rate.segment(performance.now(), numNew * this.#plan.framesPerChunk);
    for (let chunk = this.#timeline.numMade; chunk < made; chunk += 1) this.#timeline.setMade(chunk, 1);
    if (video.status === "queued") {
      const position = helios.queue_position;
      this.#state("queued", position > 0 ? `In the queue, position ${position}` : "In the queue");
    } else if (video.status === "in_progress") {
      if (this.#stage.state !== "generating") this.#state("generating", `Chunk ${made + 1} of ${helios.num_chunks}`);
    } else if (video.status === "completed") {
      const frames = plural(helios.num_frames, "frame");
      this.#state("done", wasFinished ? `${frames}, seed ${helios.seed}` : `Done, ${frames}`);
      this.#finishedJob(video);
      if (!wasFinished) this.#on.jobsChanged();
    } else {
      this.#timeline.end();
      if (helios.state === "cancelled") this.#state("stopped", "Stopped");
      else this.#failed(new api.ApiError(video.error));
      this.#on.jobsChanged();
    }
  }

  #openFile(video) {
    this.#replayUrl = null;
    this.#isSeekable = true;
    this.#player.openUrl(api.contentUrl(video));
  }

  // --- both ---

  async #finishedJob(video) {
    const id = video?.id ?? this.#session?.id;
    const job = video?.helios?.urls ? video : await api.getVideo(id).then((answer) => answer.video, () => null);
    if (job === null || job.status !== "completed") return;
    this.#stage.save(api.contentUrl(job), job.id);
    this.#stage.warn(job.helios.warnings ?? []);
    if (!this.#isSeekable) this.#replayUrl = api.contentUrl(job);
  }

  #progress(message) {
    this.#playbackRate(message.recommended_playback_rate);
    if (this.#stage.state === "queued") this.#state("generating");
    this.#chunk = message.chunk;
    if (this.#stage.state === "generating" && !this.#isAhead) this.#stage.progressOf(message, this.#plan.numStages);
    if (message.stage === undefined || message.stage === null) return;
    const made = (message.stage + message.step / message.num_steps) / this.#plan.numStages;
    this.#timeline.setMade(message.chunk, Math.min(0.96, made)); // whole only when its bytes are here
  }

  #failed(error) {
    this.#session?.abandon();
    this.#watch?.close();
    if (this.#segments.length > 0) this.#player.complete();
    this.#changes.settle();
    const isInForm = this.#session?.id == null && this.#on.refused(error);
    if (isInForm) this.#state("idle", "Ready");
    else this.#state("failed", this.#firstFrameMs === null ? "No video" : "Ended early");
    if (!isInForm) this.#stage.error(error.message);
    if (this.#session?.id != null) this.#on.jobsChanged();
  }

  #playbackFailed(message) {
    if (["failed", "stopped"].includes(this.#stage.state)) return; // the job's own end broke the stream
    this.#stage.error(`The player stopped: ${message}`);
  }

  #firstFrame(now) {
    this.#stage.firstFrameSeen();
    if (this.#firstFrameMs !== null) return;
    this.#firstFrameMs = now - this.#startedAt;
    this.#stage.stat("first", `${(this.#firstFrameMs / 1000).toFixed(2)} s`);
    this.#stage.announce("The video is playing.");
  }

  #playbackRate(rate) {
    if (typeof rate === "number" && rate > 0) this.#player.rate = Math.max(0.1, Math.min(1, rate));
  }

  #numFrames() {
    return this.#timeline.numFrames;
  }

  #duration() {
    if (this.#plan === null) return 0;
    return this.#numFrames() / this.#plan.fps;
  }

  #moved() {
    if (this.#plan === null) return;
    this.#giveCredit();
    const now = performance.now();
    if (!this.#video.ended && !this.#video.paused && now - this.#drawnAt < DRAW_MS) return; // painting costs frames
    this.#drawnAt = now;
    const duration = this.#duration();
    const position = this.#video.ended ? duration : this.#video.currentTime;
    this.#timeline.setPlayed(position * this.#plan.fps);
    this.#stage.clock(position, duration);
    this.#transport.moved(position, duration);
  }

  #measure() {
    this.#transport.update(this.#duration(), this.#isSeekable);
    if (this.#plan === null || !this.#video.hasAttribute("src")) return;
    const { decoded, dropped, fps, aheadSeconds } = this.#player.measure();
    if (this.#rate.fps !== null) this.#stage.stat("generated", this.#rate.fps.toFixed(1), "fps");
    const rate = this.#player.rate === 1 ? "" : ` · ${this.#player.rate.toFixed(2)}×`;
    if (fps !== null) this.#stage.stat("playback", fps.toFixed(1), `fps${rate}`);
    this.#stage.stat("dropped", String(dropped), `of ${decoded}`);
    this.#stage.stat("ahead", aheadSeconds.toFixed(1), "s");
    this.#giveCredit();
  }

  #replay() {
    if (this.#replayUrl === null) return false;
    const address = this.#replayUrl;
    this.#replayUrl = null;
    this.#isSeekable = true;
    this.#player.openUrl(address);
    return true;
  }

  #togglePause() {
    const action = this.#stage.state === "paused" ? "resume" : "pause";
    this.#session.control(action);
    if (action === "pause") this.#video.pause();
    else this.#video.play().catch(() => {});
  }

  #stop() {
    if (this.#session !== null) this.#session.stop();
    else api.cancelVideo(this.#plan.id).catch((error) => this.#stage.error(error.message));
  }
}
