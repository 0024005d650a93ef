"""The VAE role: the latents of a chunk become pixels, and pixels become the chunk's segment.

Knows the VAE's decoder, the way off the device and the segment encoder; keeps nothing between chunks but memory. One
thread decodes; another may encode what was decoded before.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from helios_serve.faults import NO_FAULTS, FaultPlan
from helios_serve.kernels.yuv import rgb_to_yuv420
from helios_serve.model_executor.digest import latents_digest
from helios_serve.model_executor.vae import WanVAE
from helios_serve.model_executor.vae_spread import decode_whole, with_retry
from helios_serve.parallel.collectives import ALONE, Axis
from helios_serve.types import FRAMES_PER_CHUNK, Decoded, DecodeTask, Phase, SamplingParams, Segment
from helios_serve.workers.copy_out import CopyRing, HostCopy, lane_of
from helios_serve.workers.segment import SegmentSpec, encode_segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """A decoded chunk on its way off the device, cut to the frames that belong to the video.

    copy: of the frames [F, H * 3/2, W] uint8, and of the latents [C, 9, h, w] float32 that they were decoded from.
    """

    copy: HostCopy
    phase: Phase


class VaeWorker:
    """Decodes chunks on their own, each with an empty temporal cache.

    Args:
        faults: visited at `vae.decode` with request_id and chunk.
        axis: its ranks share each decode, and each has the pixels; they decode the same latents in the same order.
    """

    def __init__(self, vae: WanVAE, faults: FaultPlan = NO_FAULTS, axis: Axis = ALONE) -> None:
        self._vae = vae
        self._faults = faults
        self._axis = axis
        self._weight = next(vae.parameters())
        self._copies = CopyRing(lane_of(self._weight.device))

    def run(self, task: DecodeTask, latents: Tensor) -> Decoded:
        """Both halves of a task, one after the other."""
        return self.encode_pictures(task, self.decode_pictures(task, latents))

    @torch.inference_mode()
    def decode_pictures(self, task: DecodeTask, latents: Tensor) -> Pictures:
        """The half that needs the device: latents [C, 9, h, w] -> YUV pictures, made but maybe still on their way.

        Raises: GroupBrokenError for whatever goes wrong on one of several ranks.
        """
        return with_retry(lambda: self._decode_pictures(task, latents), self._axis)

    @torch.inference_mode()
    def help_decode(self, task: DecodeTask, latents: Tensor) -> None:
        """A rank's share of `decode_pictures` on another one, which has the pictures.

        Raises: GroupBrokenError for whatever goes wrong.
        """
        with_retry(lambda: self._decode_task(task, latents), self._axis)

    def _decode_pictures(self, task: DecodeTask, latents: Tensor) -> Pictures:
        started_s = time.time()
        pixels = self._decode_task(task, latents)
        copy = self._copies.start(_to_yuv(pixels, task.chunk, task.params), latents.float())
        copy.wait_computed()  # until then the device is this decode's, and a step that it goes before waits
        return Pictures(copy=copy, phase=Phase(name="decode", started_s=started_s, ended_s=time.time()))

    def _decode_task(self, task: DecodeTask, latents: Tensor) -> Tensor:
        self._faults.at("vae.decode", request_id=task.request_id, chunk=task.chunk)
        return self.decode(latents)

    def encode_pictures(self, task: DecodeTask, pictures: Pictures) -> Decoded:
        """The half that needs a processor core: pictures -> segment."""
        started_s = time.time()
        with pictures.copy as (yuv, latents):
            segment = _segment(yuv.numpy(), task.request_id, task.chunk, task.params)
            digest = latents_digest(latents)
        phase = Phase(name="mux", started_s=started_s, ended_s=time.time())
        return Decoded(task_id=task.task_id, segment=segment, latents_digest=digest, phases=(pictures.phase, phase))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [C, 9, h, w] -> pixels [33, 3, H, W] in [-1, 1], in the decoder's dtype."""
        own = latents.to(self._weight.device, self._weight.dtype)[None]
        pixels = decode_whole(self._vae, self._vae.denormalize(own), self._axis)
        return pixels[0].transpose(0, 1)

    @torch.inference_mode()
    def encode_segment(self, pixels: Tensor, request_id: str, chunk: int, params: SamplingParams) -> Segment:
        """The fMP4 segment of a decoded chunk, cut to the frames that belong to the video (at least one)."""
        with self._copies.start(_to_yuv(pixels, chunk, params)) as (yuv,):
            return _segment(yuv.numpy(), request_id, chunk, params)


def _to_yuv(pixels: Tensor, chunk: int, params: SamplingParams) -> Tensor:
    """The frames that belong to the video, converted on their device."""
    return rgb_to_yuv420(pixels[: params.frames_in(chunk)])


def _segment(yuv: npt.NDArray[np.uint8], request_id: str, chunk: int, params: SamplingParams) -> Segment:
    spec = SegmentSpec(width=params.width, height=params.height, fps=params.fps, crf=params.crf, codec=params.codec)
    start_frame = FRAMES_PER_CHUNK * chunk
    init, media = encode_segment(yuv, spec, chunk, start_frame)
    return Segment(
        request_id=request_id, chunk=chunk, start_frame=start_frame, num_frames=len(yuv), init=init, media=media
    )
