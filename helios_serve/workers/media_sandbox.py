"""Decodes untrusted media in a fresh process each time, so that no file can take the server's memory, time or secrets.

Knows how to start the process, what to believe of its answer and what each of its ends means. What is decoded and
within which limits is `media`'s; how the process bounds itself is `media_child`'s. Files travel in memory without a
name, so nothing remains of a process, however it ends. Runs on Linux.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Literal

from helios_serve.errors import CapacityError, HeliosError, InvalidRequestError
from helios_serve.types import Frames, ImageFit
from helios_serve.workers import media_child
from helios_serve.workers.media import (
    MAX_IMAGE_SIDE,
    MAX_VIDEO_FRAMES,
    MAX_VIDEO_SIDES,
    MIN_VIDEO_FRAMES,
    Target,
)

logger = logging.getLogger(__name__)

_PROGRAM = Path(media_child.__file__).resolve()
_MAX_REPORT_BYTES = 4096
_MAX_MESSAGE_CHARS = 1000
_OWN_IMAGE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
"""A black PNG of one pixel."""

_NO_TARGET = Target(width=0, height=0, fit="crop")

Kind = Literal["image", "video", "size", "look"]
Reason = Literal["wall_limit", "cpu_limit", "crash", "exit", "bad_answer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """Of one process: address space, seconds of CPU time, seconds in all."""

    memory_bytes: int = 1 << 30
    cpu_s: int = 10
    wall_s: float = 20.0


class Slots:
    """Lets only so many calls in at once, in all and for each tenant; the others wait. Any thread may ask."""

    def __init__(self, *, num_at_once: int = 4, num_per_tenant: int = 2) -> None:
        self._num_at_once = num_at_once
        self._num_per_tenant = num_per_tenant
        self._changed = threading.Condition()
        self._taken: Counter[str | None] = Counter()

    @contextmanager
    def one(self, tenant: str | None) -> Iterator[None]:
        """Waits for a slot and holds it."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_free(tenant))
            self._taken[tenant] += 1
        try:
            yield
        finally:
            with self._changed:
                self._taken[tenant] -= 1
                self._taken += Counter()  # forgets those at zero
                self._changed.notify_all()

    def _is_free(self, tenant: str | None) -> bool:
        if self._taken.total() >= self._num_at_once:
            return False
        return tenant is None or self._taken[tenant] < self._num_per_tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxDecoder:
    """`media.Decoder`, each call in a process of its own. Calls block; any number of threads may call.

    slots: shared by all decoders of a server. tenant: whose files these are; None counts for nobody. program: the file
    that the process runs.

    Every method raises InvalidRequestError, `media_invalid`, when the file is refused or the process fails for whatever
    reason, and CapacityError when no process can be started.
    """

    limits: SandboxLimits = SandboxLimits()
    slots: Slots = field(default_factory=Slots)
    tenant: str | None = None
    program: Path = _PROGRAM

    def for_tenant(self, tenant: str | None) -> SandboxDecoder:
        """This decoder, counting its calls for a tenant."""
        return replace(self, tenant=tenant)

    def decode_image(self, data: bytes, width: int, height: int, fit: ImageFit) -> Frames:
        """`media.decode_image`."""
        return self._frames("image", data, Target(width=width, height=height, fit=fit), range(1, 2))

    def decode_video(self, data: bytes, width: int, height: int, fit: ImageFit) -> Frames:
        """`media.decode_video`."""
        target = Target(width=width, height=height, fit=fit)
        return self._frames("video", data, target, range(MIN_VIDEO_FRAMES, MAX_VIDEO_FRAMES + 1))

    def image_size(self, data: bytes) -> tuple[int, int]:
        """`media.image_size`."""
        job = _Job(kind="size", param="image", target=_NO_TARGET, max_frames=0)
        with self.slots.one(self.tenant), _memory_file(data) as source, _memory_file(b"") as output:
            return job.size(self._run(job, source, output))

    def video_look(self, data: bytes) -> tuple[int, int, float]:
        """`media.video_look`."""
        job = _Job(kind="look", param="video", target=_NO_TARGET, max_frames=0)
        with self.slots.one(self.tenant), _memory_file(data) as source, _memory_file(b"") as output:
            return job.look(self._run(job, source, output))

    def check(self) -> None:
        """Decodes a picture of this module's own, to notice at the start of a server that no process can.

        Raises: HeliosError.
        """
        try:
            self.decode_image(_OWN_IMAGE, 1, 1, "crop")
        except HeliosError as error:
            raise HeliosError(f"media cannot be decoded on this machine: {error.message}") from error

    def _frames(self, kind: Kind, data: bytes, target: Target, allowed: range) -> Frames:
        job = _Job(kind=kind, param=kind, target=target, max_frames=allowed[-1])
        with self.slots.one(self.tenant), _memory_file(data) as source, _memory_file(b"") as output:
            num_frames = job.num_frames(self._run(job, source, output), allowed)
            if os.fstat(output.fileno()).st_size != num_frames * target.bytes_per_frame:
                raise job.failed("bad_answer", "other frames than announced")
            output.seek(0)
            pixels = output.read()
        return Frames(data=pixels, num_frames=num_frames, height=target.height, width=target.width)

    def _run(self, job: _Job, source: IO[bytes], output: IO[bytes]) -> dict[str, object]:
        """What the process answers, if it is JSON and the process ended well."""
        process = self._start(job, source, output)
        with process:
            try:
                text = _read_all(process, self.limits.wall_s)
            finally:
                # All it may have started, too. One that closed its output is done, and keeps the status it ended with.
                with suppress(ProcessLookupError):  # where the system collects ended processes by itself
                    os.killpg(process.pid, signal.SIGKILL)
        if text is None:
            raise job.failed("wall_limit", f"it takes more than {self.limits.wall_s:g} seconds")
        if process.returncode == -signal.SIGXCPU:
            limit = f"it takes more than {self.limits.cpu_s} seconds of computing; send fewer or smaller frames"
            raise job.failed("cpu_limit", limit)
        if process.returncode < 0:
            raise job.failed("crash", f"the decoder is stopped by signal {-process.returncode}")
        if process.returncode > 0:
            raise job.failed("exit", f"the decoder ends with status {process.returncode}")
        try:
            answer: object = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise job.failed("bad_answer", "the decoder's answer cannot be read") from error
        if not isinstance(answer, dict):
            raise job.failed("bad_answer", "the decoder's answer cannot be read")
        return answer

    def _start(self, job: _Job, source: IO[bytes], output: IO[bytes]) -> subprocess.Popen[bytes]:
        files = (source.fileno(), output.fileno())
        task = media_child.Task(
            kind=job.kind,
            search_path=_search_path(),
            input=files[0],
            output=files[1],
            output_bytes=job.max_frames * job.target.bytes_per_frame,
            width=job.target.width,
            height=job.target.height,
            fit=job.target.fit,
            param=job.param,
            memory_bytes=self.limits.memory_bytes,
            cpu_s=self.limits.cpu_s,
        )
        try:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(self.program), json.dumps(task)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=files,
                cwd="/",
                env={},
                start_new_session=True,
            )
        except OSError as error:
            raise _no_room(error) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What one process does, and what its answer must be like. The answer is hostile: the file may have taken over."""

    kind: Kind
    param: str
    target: Target
    max_frames: int

    def num_frames(self, answer: dict[str, object], allowed: range) -> int:
        """Raises InvalidRequestError when the answer is a refusal or makes no sense."""
        match answer:
            case {"num_frames": int(num_frames)} if num_frames in allowed:
                return num_frames
        raise self._refused(answer)

    def size(self, answer: dict[str, object]) -> tuple[int, int]:
        """Raises InvalidRequestError when the answer is a refusal or makes no sense."""
        match answer:
            case {"size": [int(width), int(height)]} if all(0 < side <= MAX_IMAGE_SIDE for side in (width, height)):
                return width, height
        raise self._refused(answer)

    def look(self, answer: dict[str, object]) -> tuple[int, int, float]:
        """Raises InvalidRequestError when the answer is a refusal or makes no sense."""
        match answer:
            case {"look": [int(width), int(height), float(fps)]} if (
                all(0 < side <= max(MAX_VIDEO_SIDES) for side in (width, height)) and 0.0 <= fps < math.inf
            ):
                return width, height, fps
        raise self._refused(answer)

    def failed(self, reason: Reason, what: str) -> InvalidRequestError:
        logger.warning("decoding process for %s: %s (%s)", self.kind, what, reason)
        message = f"{self.param}: the file cannot be decoded: {what} ({reason})"
        return InvalidRequestError(message, param=self.param, code="media_invalid")

    def _refused(self, answer: dict[str, object]) -> InvalidRequestError:
        match answer:
            case {"error": str(message)} if len(message) <= _MAX_MESSAGE_CHARS and message.isprintable():
                return InvalidRequestError(message, param=self.param, code="media_invalid")
        return self.failed("bad_answer", "the decoder's answer makes no sense")


def _search_path() -> list[str]:
    """Where this process finds modules, and where it has found this package, which an editable install hides."""
    return [*(os.path.abspath(path) for path in sys.path if path), str(_PROGRAM.parents[2])]


@contextmanager
def _memory_file(data: bytes) -> Iterator[IO[bytes]]:
    """A file that holds `data`, has no name, stands at its beginning and is gone at the end."""
    try:
        file = os.fdopen(os.memfd_create("media"), "r+b")
    except OSError as error:
        raise _no_room(error) from error
    with file:
        try:
            file.write(data)
            file.seek(0)
        except OSError as error:
            raise _no_room(error) from error
        yield file


def _no_room(error: OSError) -> CapacityError:
    return CapacityError(f"no media can be decoded now ({error.strerror}); try again later", retry_after_s=5.0)


def _read_all(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """All that the process writes until it closes its output, cut behind 4 KiB; None when that takes too long."""
    assert process.stdout is not None
    file, deadline, text = process.stdout.fileno(), time.monotonic() + seconds, b""
    waiter = select.poll()
    waiter.register(file, select.POLLIN)
    while len(text) <= _MAX_REPORT_BYTES:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0 or not waiter.poll(remaining_s * 1000):
            return None
        piece = os.read(file, _MAX_REPORT_BYTES + 1)
        if not piece:
            break
        text += piece
    return text
