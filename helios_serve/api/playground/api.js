// The HTTP API as functions. Knows addresses, the key and the shape of errors; knows nothing of the page.

const KEY = "helios.key";
const BASE = new URL(".", document.baseURI);

/** Fires "required" when the server wants a key that it did not get. */
export const access = new EventTarget();

export class ApiError extends Error {
  constructor({ message, code = null, param = null, status = 0 }) {
    super(message);
    Object.assign(this, { code, param, status });
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const setKey = (key) => sessionStorage.setItem(KEY, key);
export const clearKey = () => sessionStorage.removeItem(KEY);

export const listModels = () => call("v1/models");
export const createVideo = (body) => call("v1/videos", { method: "POST", json: body });
export const extendVideo = (body) => call("v1/videos/extensions", { method: "POST", json: body });
export const deleteVideo = (id) => call(videoPath(id), { method: "DELETE" });
export const cancelVideo = (id) => call(`${videoPath(id)}/cancel`, { method: "POST" });
export const listVideos = ({ after = null, limit }) =>
  call(`v1/videos?limit=${limit}${after === null ? "" : `&after=${encodeURIComponent(after)}`}`);

/** The job, and for how many milliseconds the server asks us to wait before the next call. */
export async function getVideo(id) {
  const response = await send(videoPath(id));
  const wait = Number(response.headers.get("openai-poll-after-ms"));
  return { video: await response.json(), pollAfterMs: wait > 0 ? wait : 1000 };
}

export async function uploadFile(file) {
  const form = new FormData();
  form.append("purpose", "user_data");
  form.append("file", file, file.name);
  return call("v1/files", { method: "POST", body: form });
}

/** The PNG of the last frame, as a file that can be the start of another video. */
export async function lastFrame(id) {
  const response = await send(`${videoPath(id)}/content?variant=last_frame`, { accept: "image/png" });
  return new File([await response.blob()], `${id}-last.png`, { type: "image/png" });
}

/** Addresses for elements that cannot send a header; with keys, the server signs them with a token. */
export const contentUrl = (video, variant = "video") => signed(video, "content", { variant });
export const streamUrl = (video) => signed(video, "stream", {});
export const eventsUrl = (video) => signed(video, "events", {});

/** The address of a session; a browser's WebSocket cannot send the key, so it carries a short-lived secret. */
export async function realtimeUrl() {
  const address = new URL("v1/realtime/video", BASE);
  address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
  if (hasKey()) {
    const secret = await call("v1/realtime/client_secrets", { method: "POST", json: {} });
    address.searchParams.set("token", secret.value);
  }
  return address;
}

const videoPath = (id) => `v1/videos/${encodeURIComponent(id)}`;

function signed(video, kind, parameters) {
  const address = new URL(`${videoPath(video.id)}/${kind}`, BASE);
  const given = video.helios?.urls?.[kind];
  const token = given ? new URL(given, BASE).searchParams.get("token") : null;
  for (const [name, value] of Object.entries(parameters)) address.searchParams.set(name, value);
  if (token !== null) address.searchParams.set("token", token);
  return address.href;
}

async function call(path, options) {
  return (await send(path, options)).json();
}

async function send(path, { method = "GET", json, body, accept = "application/json" } = {}) {
  const headers = { accept };
  if (json !== undefined) headers["content-type"] = "application/json";
  if (hasKey()) headers.authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  let response;
  try {
    const payload = json === undefined ? body : JSON.stringify(json);
    response = await fetch(new URL(path, BASE), { method, headers, body: payload, cache: "no-store" });
  } catch {
    throw new ApiError({ message: "The server cannot be reached.", code: "unreachable" });
  }
  if (response.ok) return response;
  const error = await errorOf(response);
  if (error.status === 401) access.dispatchEvent(new CustomEvent("required", { detail: error }));
  throw error;
}

async function errorOf(response) {
  const fallback = { message: `The server answered ${response.status}.` };
  const answer = await response.json().catch(() => ({}));
  return new ApiError({ ...fallback, ...answer.error, status: response.status });
}
