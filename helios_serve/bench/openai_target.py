"""Any server that has OpenAI's /v1/videos: create with a form, poll, download.

Knows what such servers have in common. vLLM-Omni and SGLang-Diffusion take whole `seconds` only, and the fields
`num_frames`, `fps` and `seed` beside OpenAI's; `extra` is where a run says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from helios_serve.bench.http_answers import failures_named, finish_job
from helios_serve.bench.observed import Recording
from helios_serve.bench.workload import Kind, Planned
from helios_serve.errors import InvalidRequestError

_PLACE = re.compile(r"\{(num_frames|fps|seed)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIVideosTarget:
    """Sends prompt, size, model, input_reference, and seconds unless `extra` holds num_frames.

    `extra` holds fields that a server has beyond those, and replaces those of the same name. In its values
    {num_frames}, {fps} and {seed} stand for those of the request.
    """

    client: httpx2.AsyncClient
    poll_s: float
    image: bytes
    model: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    async def make(self, planned: Planned, recording: Recording) -> None:
        parts: dict[str, Any] = {name: (None, value) for name, value in self._form(planned).items()}
        if planned.kind.task == "i2v":
            parts["input_reference"] = ("image.png", self.image, "image/png")
        with failures_named():
            request = self.client.build_request("POST", "/v1/videos", files=parts)
            await finish_job(self.client, request, self.poll_s, recording)

    def _form(self, planned: Planned) -> dict[str, str]:
        kind = planned.kind
        form = {"prompt": planned.prompt}
        form |= {name: value for name, value in (("model", self.model), ("size", kind.size)) if value is not None}
        if "num_frames" not in self.extra:
            form["seconds"] = f"{kind.num_frames / kind.fps:g}"
        values = {"num_frames": str(kind.num_frames), "fps": f"{kind.fps:g}", "seed": str(planned.seed)}
        return form | {name: _PLACE.sub(lambda found: values[found[1]], text) for name, text in self.extra.items()}


def check_openai_kind(kind: Kind, extra: Mapping[str, str]) -> None:
    """Raises: InvalidRequestError for what cannot be asked of such a server."""
    if kind.via != "jobs" or kind.task == "v2v":
        raise InvalidRequestError("openai-videos: only via jobs, and only t2v and i2v: it has no others", param="api")
    if kind.steps is not None and not any("steps" in name for name in extra):
        raise InvalidRequestError(
            "steps: openai-videos has no field for them; name the server's own, such as --extra num_inference_steps=2",
            param="steps",
        )
    seconds = kind.num_frames / kind.fps
    if seconds != int(seconds) and not {"num_frames", "seconds"} & set(extra):
        raise InvalidRequestError(
            f"frames {kind.num_frames}: {seconds:g} s at {kind.fps:g} fps, but openai-videos has whole seconds; add "
            "--extra num_frames={num_frames} --extra fps={fps} where the server takes them",
            param="frames",
        )
