"""Makes a moving picture of a video, for pages that show no videos:
`python -m tools.tiny_checkpoint.picture video.mp4 docs/images/first-video.gif`. Knows files and frames alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
from PIL import Image

_SCALE = 3
_MS = 1000


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Makes an animated GIF of a video, three times as large.")
    parser.add_argument("video", type=Path)
    parser.add_argument("out", type=Path)
    told = parser.parse_args()
    with av.open(told.video) as container:
        rate = float(container.streams.video[0].average_rate or 24)
        frames = [frame.to_image() for frame in container.decode(video=0)]
    size = (_SCALE * frames[0].width, _SCALE * frames[0].height)
    first, *others = [frame.resize(size, Image.Resampling.BICUBIC) for frame in frames]
    # a GIF counts hundredths of a second
    first.save(told.out, save_all=True, append_images=others, duration=round(_MS / rate, -1), loop=0, optimize=True)
    print(f"wrote {told.out}: {len(frames)} frames, {told.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
