"""One video from request fields to files, with a progress bar: what `helios-serve generate` does.

Pixels and latents of earlier chunks are not kept in memory: segments are small, frames go to a mapped file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from helios_serve.api.convert import ParsedRequest
from helios_serve.config import ModelConfig
from helios_serve.errors import InvalidRequestError
from helios_serve.offline import Helios, VideoChunk
from helios_serve.types import SamplingParams, StepCursor
from helios_serve.workers.segment import progressive_mp4


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Files to write: the MP4, and for verification the final latents and the float frames."""

    video: Path
    latents: Path | None = None
    frames: Path | None = None

    def check(self) -> None:
        """Raises InvalidRequestError when a folder is missing, before time is spent on a video."""
        for param, path in (("output", self.video), ("save_latents", self.latents), ("save_frames", self.frames)):
            if path is not None and not path.parent.is_dir():
                raise InvalidRequestError(f"{param} {path}: the folder {path.parent} does not exist", param=param)


def generate_to_files(config: ModelConfig, body: Mapping[str, object], outputs: Outputs) -> None:
    """Makes the video of `body` (fields of the HTTP API, media as paths) and writes `outputs`.

    Raises: CheckpointError, InvalidRequestError.
    """
    outputs.check()
    console = Console(stderr=True)
    with console.status(f"loading {config.model}"):
        helios = Helios(config.model, device=config.device, dtype=config.dtype)
        parsed = helios.parse(body)
    for warning in parsed.warnings:
        console.print(f"[yellow]warning[/yellow] {warning.param}: {warning.message}")
    started = time.perf_counter()
    with _whole_files(outputs) as parts:
        init, media, latents = _run(helios, parsed, parts, console)
        parts.video.write_bytes(progressive_mp4(init, media))
        if parts.latents is not None:
            save_file({"latents": latents}, parts.latents)
    params = parsed.request.params
    elapsed = time.perf_counter() - started
    console.print(
        f"{outputs.video}: {params.num_output_frames} frames, {params.width}x{params.height}, seed {params.seed}, "
        f"{elapsed:.1f} s, {params.num_output_frames / elapsed:.2f} FPS"
    )


@contextmanager
def _whole_files(outputs: Outputs) -> Iterator[Outputs]:
    """Names beside those of `outputs` to write to: they take their places when all is done, and vanish on failure."""
    finals = [path for path in (outputs.video, outputs.latents, outputs.frames) if path is not None]
    parts = {path: path.with_name(f"{path.name}.part") for path in finals}
    try:
        yield Outputs(
            video=parts[outputs.video],
            latents=None if outputs.latents is None else parts[outputs.latents],
            frames=None if outputs.frames is None else parts[outputs.frames],
        )
        for final, part in parts.items():
            part.replace(final)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _run(
    helios: Helios, parsed: ParsedRequest, outputs: Outputs, console: Console
) -> tuple[bytes, list[bytes], Tensor]:
    """Makes all chunks; returns the init segment, the media of each segment, and the latents [1, C, 9K, h, w]."""
    params = parsed.request.params
    frames = _frames_file(outputs.frames, params)
    init, media, latents = b"", list[bytes](), list[Tensor]()
    with _progress(params, console) as bar:
        for chunk in helios.run(parsed.request, bar.on_step):
            segment = helios.encode_segment(chunk, params)
            init = segment.init
            media.append(segment.media)
            if outputs.latents is not None:
                latents.append(chunk.latents.float().cpu())
            if frames is not None:
                stop = chunk.start_frame + len(chunk.pixels)
                frames[0, chunk.start_frame : stop] = _unit_frames(chunk)
            bar.on_chunk(chunk)
    if frames is not None:
        frames.flush()
    stacked = torch.cat(latents, dim=1)[None].contiguous() if latents else torch.empty(0)
    return init, media, stacked


def _unit_frames(chunk: VideoChunk) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """[F, H, W, 3] float32 in [0, 1]."""
    return (chunk.pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _frames_file(path: Path | None, params: SamplingParams) -> np.memmap[tuple[int, ...], np.dtype[np.float32]] | None:
    if path is None:
        return None
    shape = (1, params.num_output_frames, params.height, params.width, 3)
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)


class _Bar:
    """Steps and chunks on one line."""

    def __init__(self, progress: Progress, params: SamplingParams) -> None:
        self._progress = progress
        self._num_chunks = params.num_chunks
        self._started = time.perf_counter()
        self._num_frames = 0
        self._task = progress.add_task("", total=params.total_steps, chunk=f"chunk 0/{self._num_chunks}", fps="- FPS")

    def on_step(self, cursor: StepCursor) -> None:
        self._progress.update(self._task, advance=1, chunk=f"chunk {cursor.chunk + 1}/{self._num_chunks}")

    def on_chunk(self, chunk: VideoChunk) -> None:
        self._num_frames += len(chunk.pixels)
        fps = self._num_frames / (time.perf_counter() - self._started)
        self._progress.update(self._task, fps=f"{fps:.2f} FPS")


@contextmanager
def _progress(params: SamplingParams, console: Console) -> Iterator[_Bar]:
    columns = (
        TextColumn("{task.fields[chunk]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TextColumn("{task.fields[fps]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress, params)
