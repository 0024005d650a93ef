"""Prompts, traces, images and videos that requests are made of: read from files, or made here.

Knows file formats; the built-in picture and video are drawn, so that a benchmark needs nothing but its command.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from helios_serve.bench.workload import Prompt
from helios_serve.errors import InvalidRequestError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BUILT_IN_PROMPTS = tuple(
    Prompt(text=text)
    for text in (
        "A lighthouse on a cliff in the morning, waves breaking below, slow aerial shot",
        "A red ball rolls over green grass in bright sunlight, low camera angle",
        "Paper boats drift down a rain-filled gutter at dusk, shallow focus, warm backlight",
        "A storm front crosses a wide strait while gulls turn in the wind, handheld camera",
        "An old tram climbs a steep street between painted houses, seen from behind",
        "Steam rises from a kettle in a small kitchen as snow falls outside the window",
        "A fox walks along a frozen stream at first light, its breath visible, long lens",
        "Close-up of a potter's hands shaping a bowl on a turning wheel, clay dust in the light",
    )
)
_COLUMNS = ("refined_prompt", "prompt", "text", "caption")
"""The first that a row has text in: the original's scripts take `refined_prompt` before `prompt`, too."""
_VIDEO_FRAMES = 33
"""Of the built-in video: the least that a video-to-video request may give."""


def read_prompts(path: Path, with_lengths: bool = False) -> list[Prompt]:
    """One prompt a line, or a CSV with a prompt column; `with_lengths` takes frames from its `duration` column, as in
    HeliosBench's.

    Raises: InvalidRequestError when the file cannot be read or holds no prompt.
    """
    text = _read_text(path, "prompts")
    if path.suffix.lower() == ".csv":
        prompts = list(_csv_prompts(path, text, with_lengths))
    elif with_lengths:
        raise InvalidRequestError(f"prompts {path}: only a CSV with a duration column gives lengths", param="prompts")
    else:
        prompts = [Prompt(text=line.strip()) for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InvalidRequestError(f"prompts {path}: holds no prompt", param="prompts")
    return prompts


def _csv_prompts(path: Path, text: str, with_lengths: bool) -> Iterator[Prompt]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    names = {name.strip().lower(): name for name in rows.fieldnames or ()}
    columns = [names[name] for name in _COLUMNS if name in names]
    if not columns:
        raise InvalidRequestError(
            f"prompts {path}: needs one of the columns {', '.join(_COLUMNS)}; it has {', '.join(names)}",
            param="prompts",
        )
    if with_lengths and "duration" not in names:
        raise InvalidRequestError(f"prompts {path}: has no duration column, in frames", param="prompts")
    for row in rows:
        prompt = next((text for column in columns if (text := (row[column] or "").strip())), None)
        if prompt is not None:
            frames = _whole(path, rows.line_num, row[names["duration"]]) if with_lengths else None
            yield Prompt(text=prompt, num_frames=frames)


def _whole(path: Path, line: int, text: str | None) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise InvalidRequestError(
            f"prompts {path}, line {line}: duration {text!r} must be frames, a whole number", param="prompts"
        ) from None


def read_trace(path: Path) -> tuple[float, ...]:
    """Seconds of arrivals: one number a line, or JSON objects with `at` or `timestamp`; sorted.

    Raises: InvalidRequestError naming the line that cannot be read.
    """
    times = []
    for number, line in enumerate(_read_text(path, "trace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            read = json.loads(line)
            time = float(read["at"] if "at" in read else read["timestamp"]) if isinstance(read, dict) else float(read)
        except (ValueError, TypeError, KeyError):
            time = math.nan
        if not math.isfinite(time):
            raise InvalidRequestError(
                f"trace {path}, line {number}: must be seconds, or a JSON object with `at` in seconds", param="trace"
            )
        times.append(time)
    return tuple(sorted(times))


def read_media(path: Path | None, made: bytes, param: str) -> bytes:
    """A file's bytes, or what was made when there is no file."""
    if path is None:
        return made
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"{param} {path}: {error.strerror}", param=param) from error


def built_in_image() -> bytes:
    """A PNG of 640x384, the same on every machine."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(_picture(0)).save(out, "PNG")
    return out.getvalue()


def built_in_video() -> bytes:
    """An MP4 of 33 frames of 640x384 at 24 a second, a pattern that moves."""
    from fractions import Fraction

    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(24), options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 640, 384, "yuv420p"
        for index in range(_VIDEO_FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_picture(index), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def _picture(index: int) -> npt.NDArray[np.uint8]:
    """[384, 640, 3]."""
    import numpy as np

    rows, columns = np.mgrid[0:384, 0:640]
    waves = np.stack([np.sin((columns + 9 * index) / 40), np.cos(rows / 30), np.sin((rows + columns) / 50)], axis=-1)
    return (127.5 + 127 * waves).astype(np.uint8)


def _read_text(path: Path, param: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidRequestError(f"{param} {path}: {error.strerror}", param=param) from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{param} {path}: must be UTF-8 text", param=param) from error
