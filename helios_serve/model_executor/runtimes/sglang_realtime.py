"""Sessions of SGLang-Diffusion's `/v1/realtime_video/generate`: one request of its scheduler for each chunk, and
prompts that change between chunks.

Knows SGLang's WebSocket messages; the video itself lives with the stages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sglang.multimodal_gen.runtime.entrypoints.openai.protocol import RealtimeEvent, RealtimeVideoGenerationsRequest
from sglang.multimodal_gen.runtime.entrypoints.openai.realtime.generate_session import (
    GenerateSession,
    RealtimeChunkContext,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.realtime.realtime_adapter import (
    BaseRealtimeModelAdapter,
    RealtimeChunkInputs,
    save_realtime_first_frame,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.utils import build_sampling_params
from sglang.multimodal_gen.runtime.server_args import ServerArgs

from helios_serve.model_executor.runtimes.sglang_requests import MAX_FRAMES, HeliosServeSamplingParams
from helios_serve.types import FRAMES_PER_CHUNK, LATENT_FRAMES_PER_CHUNK

_OF_THE_SESSION = frozenset(
    {
        "type",
        "prompt",
        "first_frame",
        "condition_inputs",
        "max_chunks",
        "num_frames",
        "realtime_output_format",
        "realtime_preview_max_width",
        "realtime_output_pacing",
    }
)
"""Fields of the first message that say how a session goes, not what its chunks are."""


@dataclass(slots=True)
class SessionControl:
    """What the next chunks are to show. event_id: of the event that changed the prompt last. transition: what it said
    about the way there."""

    prompt: str = ""
    event_id: int | None = None
    transition: dict[str, int] = field(default_factory=dict)


class HeliosServeRealtimeAdapter(BaseRealtimeModelAdapter):  # type: ignore[misc]
    """Plays a video chunk by chunk, up to `max_chunks` or `num_frames` of its first message. An event of kind `prompt`
    takes over from the next chunk on; its payload is the prompt, or an object with `prompt` and `transition_chunks`."""

    def create_state(self) -> SessionControl:
        return SessionControl()

    async def on_init(self, session: GenerateSession, request: RealtimeVideoGenerationsRequest) -> None:
        """Raises: ValueError for a request that cannot be served as it is written."""
        await save_realtime_first_frame(session, request)
        chunks = -(-min(request.num_frames or MAX_FRAMES, MAX_FRAMES) // FRAMES_PER_CHUNK)
        request.max_chunks = chunks if request.max_chunks is None else min(chunks, request.max_chunks)
        session.adapter_state.prompt = request.prompt
        _sampling_params(session.id, request, RealtimeChunkInputs(prompt=request.prompt))

    def ingest_event(self, session: GenerateSession, event: RealtimeEvent) -> str:
        """Raises: ValueError for what is no change of the prompt."""
        if event.kind != "prompt":
            raise ValueError(f"event kind {event.kind}: only prompt")
        payload = {"prompt": event.payload} if isinstance(event.payload, str) else event.payload
        control: SessionControl = session.adapter_state
        control.prompt, control.transition = _prompt_change(payload)
        control.event_id = event.event_id
        return f"prompt from chunk {session.generate_chunk_cnt} on"

    def get_chunk_size(self, session: GenerateSession, server_args: ServerArgs, chunk: RealtimeChunkContext) -> int:
        """Latent frames."""
        return LATENT_FRAMES_PER_CHUNK

    def sample_chunk_inputs(
        self, session: GenerateSession, server_args: ServerArgs, chunk: RealtimeChunkContext, chunk_size: int
    ) -> RealtimeChunkInputs:
        control: SessionControl = session.adapter_state
        return RealtimeChunkInputs(prompt=control.prompt, condition_inputs=dict(control.transition))

    def build_sampling_params(
        self,
        session: GenerateSession,
        server_args: ServerArgs,
        chunk: RealtimeChunkContext,
        chunk_inputs: RealtimeChunkInputs,
        chunk_size: int,
    ) -> HeliosServeSamplingParams:
        assert session.request is not None
        return _sampling_params(chunk.request_id, session.request, chunk_inputs)

    def get_realtime_event_id(self, session: GenerateSession) -> int | None:
        """Of the change that this chunk shows."""
        event_id: int | None = session.adapter_state.event_id
        return event_id


def _prompt_change(payload: Any) -> tuple[str, dict[str, int]]:
    """Raises: ValueError for what is none."""
    wrong = "prompt event: its payload must be a prompt, or an object with prompt and transition_chunks (0 to 8)"
    if not isinstance(payload, dict) or not payload.keys() <= {"prompt", "transition_chunks"}:
        raise ValueError(wrong)
    prompt = payload.get("prompt")
    transition = {key: value for key, value in payload.items() if key == "transition_chunks"}
    if not isinstance(prompt, str) or not prompt or not all(value in range(9) for value in transition.values()):
        raise ValueError(wrong)
    return prompt, transition


def _sampling_params(
    request_id: str, request: RealtimeVideoGenerationsRequest, inputs: RealtimeChunkInputs
) -> HeliosServeSamplingParams:
    """Of one chunk: what the client wrote in its first message, and nothing that SGLang put there for other models.

    Raises: ValueError for what cannot be served as it is written.
    """
    written = request.model_dump(include=request.model_fields_set - _OF_THE_SESSION)
    extras = request.model_extra or {}
    assert request.max_chunks is not None
    sampling: HeliosServeSamplingParams = build_sampling_params(
        request_id,
        **{name: value for name, value in written.items() if name not in extras},
        prompt=inputs.prompt,
        num_frames=request.max_chunks * FRAMES_PER_CHUNK if request.num_frames is None else request.num_frames,
        image_path=request.first_frame,
        output_file_name=request_id,
        save_output=False,
        condition_inputs=inputs.condition_inputs,
        api_fields=extras,
    )
    return sampling
