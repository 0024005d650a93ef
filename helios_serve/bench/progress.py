"""What the terminal shows while a run goes on: counts, and what has been seen so far.

Knows rich; decides nothing. Where nobody looks, it says one line for each run.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from helios_serve.bench.metrics import percentile, time_to_first_segment_s
from helios_serve.bench.observed import Observed


@dataclass(kw_only=True)
class ProgressView:
    """A context manager, told by `load` and `campaign`; draws on `console` four times a second."""

    console: Console
    title: str = ""
    num_requests: int = 0
    num_sent: int = 0
    num_ended: int = 0
    num_segments: int = 0
    num_frames: int = 0
    started: float = field(default_factory=time.monotonic)
    first_segments_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    _live: Live | None = None

    def __enter__(self) -> ProgressView:
        if self.console.is_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, title: str, num_requests: int) -> None:
        self.title, self.num_requests = title, num_requests
        self.num_sent = self.num_ended = self.num_segments = self.num_frames = 0
        self.started = time.monotonic()
        self.first_segments_s, self.errors = [], Counter()
        if self._live is None:
            self.console.print(f"{title}: {num_requests} requests", highlight=False)

    def sent(self) -> None:
        self.num_sent += 1

    def segment(self, num_frames: int) -> None:
        self.num_segments += 1
        self.num_frames += num_frames

    def ended(self, seen: Observed) -> None:
        self.num_ended += 1
        if seen.error is not None:
            self.errors[seen.error] += 1
        elif not seen.segments:
            self.num_frames += seen.num_frames or 0
        if (first_s := time_to_first_segment_s(seen)) is not None:
            self.first_segments_s.append(first_s)

    def line(self) -> str:
        """Such as `2 requests/s  12/40 done, 3 running  18 segments, 21.4 fps  first segment p50 1.2 s`."""
        seconds = max(1e-3, time.monotonic() - self.started)
        parts = [
            self.title,
            f"{self.num_ended}/{self.num_requests} done, {self.num_sent - self.num_ended} running",
            f"{self.num_segments} segments, {self.num_frames / seconds:.1f} fps",
        ]
        if self.first_segments_s:
            parts.append(f"first segment p50 {percentile(sorted(self.first_segments_s), 50):.2f} s")
        if self.errors:
            parts.append(", ".join(f"{code} {count}" for code, count in self.errors.most_common(3)))
        return "  ".join([*parts, f"{seconds:.0f} s"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.line(), overflow="ellipsis", no_wrap=True)
