// The form: what the user wants, as fields of the API, and errors next to the field they are about.

import { ApiError, uploadFile } from "./api.js";
import { byId, make, plural } from "./dom.js";

const INLINE_BYTES = 16 * 2 ** 20; // larger files are uploaded first: a session's messages end at 32 MiB
const CUSTOM = "custom";

// Which field of the form shows an error about which parameter; the last part of a dotted path counts.
const FIELD_OF = {
  prompts: "prompt", width: "size", height: "size", aspect_ratio: "size", resolution: "size",
  num_frames: "length", seconds: "length", frames: "length", duration: "length",
  input_reference: "media", image: "media", image_url: "media", video: "media", video_url: "media", file_id: "media",
  pyramid_steps: "steps", pyramid_num_inference_steps_list: "steps", num_inference_steps: "steps",
};

export class Composer {
  #model = null;
  #media = null; // {file, kind: "image" | "video", address}
  #extend = null; // id of the video to continue
  #onPlan;
  #form = byId("composer");

  /** `onSubmit({request, plan, extend})`; `onPlan({numFrames, framesPerChunk})` as soon as the length is known. */
  constructor({ onSubmit, onPlan }) {
    this.#onPlan = onPlan;
    this.#bindMedia();
    byId("size").addEventListener("change", () => this.#sizeChanged());
    for (const id of ["length", "length-unit", "fps"]) byId(id).addEventListener("input", () => this.#lengthChanged());
    byId("seed-dice").addEventListener("click", () => {
      byId("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
    });
    byId("extending-clear").addEventListener("click", () => this.extend(null));
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.metaKey || event.ctrlKey)) this.#form.requestSubmit();
    });
    this.#form.addEventListener("input", ({ target }) => this.#clearError(target.closest(".field")));
    this.#form.addEventListener("submit", async (event) => {
      event.preventDefault();
      this.clearErrors();
      byId("generate").disabled = true;
      try {
        onSubmit(await this.#read());
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        this.showError(error);
      } finally {
        byId("generate").disabled = this.#model === null;
      }
    });
    byId("generate").disabled = true;
  }

  /** Offers what `model` (an item of /v1/models) can do. */
  offer(model) {
    this.#model = model;
    const { recommended_sizes: sizes, default_fps: fps, default_steps: steps, num_stages: numStages, variant } = model.helios;
    byId("size").replaceChildren(
      ...sizes.map((size) => make("option", { value: size }, size.replace("x", " × "))),
      make("option", { value: CUSTOM }, "Custom"),
    );
    const { example_prompt: example } = model.helios;
    if (example) byId("prompt").placeholder = example;
    byId("fps").value = String(fps);
    byId("fps").placeholder = String(fps);
    byId("steps-legend").textContent = numStages === 1 ? "Steps" : "Steps per stage";
    byId("steps").replaceChildren(...steps.map((count, stage) => {
      const label = `Steps of stage ${stage + 1}`;
      return make("input", { inputmode: "numeric", placeholder: String(count), autocomplete: "off", "aria-label": label });
    }));
    const hasGuidance = variant !== "distilled";
    byId("guidance-field").hidden = !hasGuidance;
    byId("negative-field").hidden = !hasGuidance;
    byId("profile-field").hidden = variant !== "distilled";
    byId("generate").disabled = false;
    this.#sizeChanged();
    this.#lengthChanged();
  }

  /** Makes the next video a continuation of `video`; null: an own video again. */
  extend(video) {
    this.#extend = video?.id ?? null;
    byId("extending").hidden = video === null;
    for (const id of ["media-field", "size-field", "fps-field"]) byId(id).hidden = video !== null;
    if (video !== null) {
      byId("extending-name").textContent = video.prompt;
      byId("prompt").value = video.prompt;
      this.setMedia(null);
      byId("fps").value = String(video.helios.fps);
      byId("size").value = CUSTOM;
      byId("size-custom").value = video.size;
      byId("prompt").focus();
    }
    if (byId("length-unit").value === "open" && video !== null) byId("length-unit").value = "seconds";
    this.#lengthChanged();
  }

  setMedia(file) {
    if (this.#media !== null) URL.revokeObjectURL(this.#media.address);
    byId("media").value = "";
    this.#clearError(byId("media-field"));
    const kind = file?.type.split("/")[0];
    if (file !== null && kind !== "image" && kind !== "video") {
      const message = `${file.name}: an image (PNG, JPEG, WebP) or a video (MP4, WebM) is needed.`;
      this.showError(new ApiError({ message, param: "image" }));
      file = null;
    }
    this.#media = file === null ? null : { file, kind, address: URL.createObjectURL(file) };
    byId("drop").hidden = file !== null;
    byId("preview").hidden = file === null;
    for (const shown of ["image", "video"]) {
      const element = byId(`preview-${shown}`);
      element.hidden = file === null || shown !== kind;
      if (element.hidden) element.removeAttribute("src");
      else element.src = this.#media.address;
    }
    this.#offerAuto(kind === "image" && file !== null);
    if (file === null) return;
    byId("preview-name").textContent = file.name;
    byId("preview-note").textContent = kind === "image" ? "The video starts from this image" : "The video continues this one";
  }

  /** Shows an error of the API at its field, or at the end of the form; false when the form has no place for it. */
  showError(error) {
    if (error.param === null) return false;
    const name = error.param.split(/[.[]/).filter((part) => part !== "helios")[0];
    const field = this.#form.querySelector(`.field[data-param="${FIELD_OF[name] ?? name}"]`);
    if (field === null || field.hidden) {
      byId("form-error").textContent = error.message;
      byId("form-error").hidden = false;
      return true;
    }
    const control = field.querySelector("input:not([hidden])") ?? field.querySelector("textarea, select");
    field.querySelector(".field-error").textContent = error.message;
    control.setAttribute("aria-invalid", "true");
    const closed = field.closest("details:not([open])");
    if (closed) closed.open = true;
    control.focus();
    return true;
  }

  clearErrors() {
    byId("form-error").hidden = true;
    for (const field of this.#form.querySelectorAll(".field")) this.#clearError(field);
  }

  #clearError(field) {
    if (field === null) return;
    for (const control of field.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
    const message = field.querySelector(".field-error");
    if (message) message.textContent = "";
  }

  async #read() {
    const { frames_per_chunk: framesPerChunk, num_stages: numStages } = this.#model.helios;
    const prompt = byId("prompt").value.trim();
    if (prompt === "") throw new ApiError({ message: "Say what the video should show.", param: "prompt" });
    const unit = byId("length-unit").value;
    const isExtension = this.#extend !== null;
    const request = { prompt };
    if (unit !== "open") request[unit] = number("length", unit);
    if (!isExtension) {
      request.model = this.#model.id;
      request.size = this.#size();
      if (byId("fps").value.trim() !== "") request.fps = number("fps", "fps");
      if (this.#media !== null) Object.assign(request, await this.#readMedia());
    }
    if (byId("seed").value.trim() !== "") request.seed = this.#seed();
    const negative = byId("negative-field").hidden ? "" : byId("negative").value.trim();
    if (negative !== "") request.negative_prompt = negative;
    const helios = this.#helios();
    if (Object.keys(helios).length > 0) request.helios = helios;
    const fps = request.fps ?? (Number(byId("fps").value) || this.#model.helios.default_fps);
    const numFrames = unit === "open" ? null : framesOf(unit, request[unit], fps);
    const size = /^\d+x\d+$/.test(this.#size()) ? this.#size() : this.#model.helios.recommended_sizes[0];
    const [width, height] = size.split("x").map(Number);
    return { request, extend: this.#extend, plan: { width, height, fps, numFrames, framesPerChunk, numStages, prompt } };
  }

  #size() {
    return byId("size").value === CUSTOM ? byId("size-custom").value.trim().replace(/\s*[x×*]\s*/i, "x") : byId("size").value;
  }

  #seed() {
    const seed = number("seed", "seed");
    if (Number.isSafeInteger(seed)) return seed;
    throw new ApiError({ message: `A whole number up to ${Number.MAX_SAFE_INTEGER} is needed here.`, param: "seed" });
  }

  #helios() {
    const helios = {};
    const inputs = [...byId("steps").children];
    if (inputs.some(({ value }) => value.trim() !== "")) {
      helios.steps = inputs.map(({ value, placeholder }) => {
        const steps = Number(value.trim() || placeholder);
        if (!Number.isInteger(steps)) throw new ApiError({ message: `${value}: a whole number is needed.`, param: "steps" });
        return steps;
      });
    }
    const profile = this.#form.querySelector("[name=profile]:checked").value;
    if (!byId("profile-field").hidden && profile !== "quality") helios.profile = profile;
    const hasGuidance = !byId("guidance-field").hidden && byId("guidance").value.trim() !== "";
    if (hasGuidance) helios.guidance_scale = number("guidance", "guidance_scale");
    return helios;
  }

  async #readMedia() {
    const { file, kind } = this.#media;
    if (file.size > INLINE_BYTES) {
      const { id } = await uploadFile(file);
      return kind === "image" ? { input_reference: { file_id: id } } : { video: { file_id: id } };
    }
    const address = await dataUri(file);
    return kind === "image" ? { image: address } : { video: { video_url: address } };
  }

  /** With an image, the server can choose the size that fits it best. */
  #offerAuto(isOffered) {
    const size = byId("size");
    const option = size.querySelector("[value=auto]");
    if (isOffered && option === null) size.prepend(make("option", { value: "auto" }, "Like the image"));
    if (!isOffered) option?.remove();
    this.#sizeChanged();
  }

  #sizeChanged() {
    byId("size-custom").hidden = byId("size").value !== CUSTOM;
  }

  #lengthChanged() {
    const unit = byId("length-unit").value;
    const isOpen = unit === "open";
    byId("length").hidden = isOpen;
    const hint = byId("length-hint");
    const fps = Number(byId("fps").value) || this.#model?.helios.default_fps;
    const length = Number(byId("length").value);
    if (this.#model === null) return;
    const framesPerChunk = this.#model.helios.frames_per_chunk;
    if (isOpen || !(length > 0)) {
      hint.textContent = isOpen ? "Stop it when you have seen enough" : "";
      this.#onPlan({ numFrames: null, framesPerChunk });
      return;
    }
    const frames = framesOf(unit, length, fps);
    const chunks = plural(Math.ceil(frames / framesPerChunk), "chunk");
    if (frames <= this.#model.helios.max_frames) this.#onPlan({ numFrames: frames, framesPerChunk });
    const other = unit === "seconds" ? plural(frames, "frame") : `${(frames / fps).toFixed(1)} s`;
    hint.textContent = `${this.#extend === null ? "" : "Adds "}${other} · ${chunks}`;
  }

  #bindMedia() {
    byId("media").addEventListener("change", ({ target }) => target.files.length > 0 && this.setMedia(target.files[0]));
    byId("media-clear").addEventListener("click", () => {
      this.setMedia(null);
      byId("media").focus();
    });
    const field = byId("media-field");
    for (const name of ["dragenter", "dragover"]) {
      field.addEventListener(name, (event) => {
        event.preventDefault();
        field.classList.add("over");
      });
    }
    for (const name of ["dragleave", "drop"]) field.addEventListener(name, () => field.classList.remove("over"));
    field.addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files.length > 0) this.setMedia(event.dataTransfer.files[0]);
    });
  }
}

function number(id, param) {
  const text = byId(id).value.trim().replace(",", ".");
  const value = Number(text);
  if (text !== "" && Number.isFinite(value)) return value;
  throw new ApiError({ message: text === "" ? "A number is needed here." : `${text} is not a number.`, param });
}

const framesOf = (unit, length, fps) => Math.max(1, Math.round(unit === "seconds" ? length * fps : length));

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new ApiError({ message: `${file.name} cannot be read.`, param: "image" })));
    reader.readAsDataURL(file);
  });
}
