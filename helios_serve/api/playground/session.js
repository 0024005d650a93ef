// The client of WS /v1/realtime/video (protocol helios.v1). Knows messages, credit and reconnection; knows no page.

import { access, ApiError, realtimeUrl } from "./api.js";

const RESUME_WINDOW_MS = 30_000; // how long the server keeps a session without its client
const PING_MS = 10_000;
const SILENCE_MS = 25_000; // a socket that carries nothing for so long, pongs included, is taken as lost
const CLOSED = { policy: 1008, internal: 1011, noCapacity: 1013, badStart: 4400, idle: 4408 };
let numEvents = 0;

/**
 * One session. `on` is told what happens:
 * start(message), segment(metadata, bytes), queued(message), applied({event_id, chunk, start_frame}),
 * refused(eventId, error), progress(message), state(message), lost(), resumed(), done(message), failed(error),
 * unavailable(): no session could be opened, no job exists.
 */
export class Session {
  id;
  #request;
  #on;
  #socket = null;
  #metadata = null;
  #lastSegment = -1;
  #acked = -1;
  #pending = new Map(); // event id -> interaction without a receipt
  #isOver = false;
  #hasStarted = false;
  #lostAt = null;
  #attempt = 0;
  #heardAt = 0;
  #pingTimer = null;

  /** `id` of a session to go on with from its first segment; null: a new one, that `request` describes. */
  constructor(request, on, id = null) {
    this.id = id;
    this.#request = request;
    this.#on = on;
  }

  async open() {
    await this.#connect();
  }

  /** Sends a new prompt and returns the id under which its receipts come. */
  change(prompt, transitionChunks) {
    numEvents += 1;
    const eventId = `change-${Date.now().toString(36)}-${numEvents}`;
    const interaction = { event_id: eventId, event: { prompt }, transition_chunks: transitionChunks };
    this.#pending.set(eventId, interaction);
    this.#send({ type: "session.interaction", interaction });
    return eventId;
  }

  control(action) {
    this.#send({ type: "session.control", action });
  }

  stop() {
    this.#send({ type: "session.stop" });
  }

  /** Tells the server that segments up to this one were played: the credit it generates on. */
  ack(segment, bufferedSeconds) {
    if (segment <= this.#acked) return;
    for (let played = this.#acked + 1; played <= segment; played += 1) {
      this.#send({ type: "session.ack", segment: played, buffered_seconds: round(bufferedSeconds) });
    }
    this.#acked = segment;
  }

  /** Leaves without a word; the server lets the session end. */
  abandon() {
    this.#finish();
  }

  async #connect() {
    let address;
    try {
      address = await realtimeUrl();
    } catch (error) {
      if (this.#isOver) return;
      if (this.id === null || error.status === 401) this.#fail(error);
      else this.#retry();
      return;
    }
    if (this.#isOver) return;
    const socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    socket.addEventListener("open", () => this.#opened());
    socket.addEventListener("message", ({ data }) => socket === this.#socket && this.#received(data));
    socket.addEventListener("close", (event) => socket === this.#socket && this.#closed(event));
  }

  #opened() {
    this.#metadata = null;
    this.#heardAt = performance.now();
    const common = { type: "session.start", protocol: "helios.v1", format: "m4s" };
    if (this.id === null) this.#send({ ...common, ...this.#request });
    else this.#send({ ...common, resume: { id: this.id, after_segment: this.#lastSegment } });
    this.#pingTimer = setInterval(() => this.#ping(), PING_MS);
  }

  #ping() {
    if (performance.now() - this.#heardAt > SILENCE_MS) this.#lose();
    else this.#send({ type: "session.ping" });
  }

  #received(data) {
    this.#heardAt = performance.now();
    if (typeof data !== "string") this.#segment(data);
    else this.#message(JSON.parse(data));
  }

  #segment(bytes) {
    const metadata = this.#metadata;
    this.#metadata = null;
    if (metadata.transport_chunk_index <= this.#lastSegment) return; // sent again after a resume
    this.#lastSegment = metadata.transport_chunk_index;
    for (const id of metadata.started_event_ids ?? []) {
      this.#applied({ event_id: id, chunk: metadata.generation_chunk_index, start_frame: metadata.start_frame });
    }
    this.#on.segment(metadata, bytes);
  }

  #message(message) {
    switch (message.type) {
      case "video.start": return this.#started(message);
      case "video.chunk_metadata":
        this.#metadata = message;
        return undefined;
      case "session.interaction.queued": return this.#on.queued(message);
      case "session.interaction.applied": return this.#applied(message);
      case "video.progress": return this.#on.progress(message);
      case "session.state": return this.#on.state(message);
      case "session.done":
        this.#finish();
        return this.#on.done(message);
      case "error": return this.#refused(message);
      default: return undefined; // pong, and what later versions add
    }
  }

  #started(message) {
    const isResumed = this.#hasStarted;
    this.#hasStarted = true;
    this.id = message.request_id;
    this.#lostAt = null;
    this.#attempt = 0;
    if (!isResumed) return this.#on.start(message);
    if (this.#acked >= 0) this.#send({ type: "session.ack", segment: this.#acked });
    for (const interaction of this.#pending.values()) this.#send({ type: "session.interaction", interaction });
    return this.#on.resumed();
  }

  #applied(message) {
    this.#pending.delete(message.event_id);
    this.#on.applied(message);
  }

  #refused(message) {
    const error = new ApiError({ ...message, ...message.error });
    if (message.event_id && this.id !== null) {
      this.#pending.delete(message.event_id);
      this.#on.refused(message.event_id, error);
    } else {
      this.#fail(error);
    }
  }

  #closed({ code, reason }) {
    clearInterval(this.#pingTimer);
    if (this.#isOver) return;
    if (code === CLOSED.policy) {
      const error = new ApiError({ message: reason || "The server refused this session.", code: "invalid_api_key" });
      access.dispatchEvent(new CustomEvent("required", { detail: error }));
      this.#fail(error);
    } else if (code === CLOSED.noCapacity) {
      this.#fail(new ApiError({ message: reason || "The server is at capacity. Try again soon.", code: "capacity_exceeded" }));
    } else if (code === CLOSED.badStart || code === CLOSED.idle || code === CLOSED.internal) {
      const told = code === CLOSED.idle ? "The session was idle for too long and has ended." : "The server ended the session.";
      this.#fail(new ApiError({ message: reason || told }));
    } else if (this.id === null) {
      this.#finish();
      this.#on.unavailable();
    } else {
      this.#retry();
    }
  }

  #lose() {
    const socket = this.#socket;
    this.#socket = null; // its own close event may take minutes
    clearInterval(this.#pingTimer);
    socket.close();
    this.#retry();
  }

  #retry() {
    const now = performance.now();
    if (this.#lostAt === null) {
      this.#lostAt = now;
      this.#on.lost();
    }
    if (now - this.#lostAt > RESUME_WINDOW_MS) {
      this.#fail(new ApiError({ message: "The connection was lost.", code: "connection_lost" }));
      return;
    }
    this.#attempt += 1;
    const wait = Math.min(4000, 125 * 2 ** this.#attempt);
    setTimeout(() => this.#isOver || this.#connect(), wait);
  }

  #fail(error) {
    if (this.#isOver) return;
    this.#finish();
    this.#on.failed(error);
  }

  #finish() {
    this.#isOver = true;
    clearInterval(this.#pingTimer);
    this.#socket?.close();
  }

  #send(message) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }
}

const round = (value) => Math.round(value * 1000) / 1000;
