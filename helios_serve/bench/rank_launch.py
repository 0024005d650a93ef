"""Calls this command again on several ranks of this node, by torchrun. Knows processes; measures nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from helios_serve.errors import HeliosError, InvalidRequestError

IN_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Is in the environment of the processes that torchrun starts."""


def is_in_torchrun() -> bool:
    return IN_TORCHRUN in os.environ


def start_ranks(counts: Sequence[int], arguments: Sequence[str]) -> None:
    """Runs this command once for each number of ranks on this node, by torchrun, one after the other.

    Args:
        arguments: of `helios-serve`, without the number of ranks.

    Raises: HeliosError when one ends badly.
    """
    for count in counts:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        done = subprocess.run([*launch, "-m", "helios_serve.cli", *arguments], check=False)
        if done.returncode != 0:
            raise HeliosError(f"ranks {count}: the run ended with status {done.returncode}; what it said is above")


def parse_counts(name: str, text: str) -> tuple[int, ...]:
    """Raises: InvalidRequestError for what is no list of counts."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise InvalidRequestError(f"{name} {text}: must be whole numbers from 1, such as 1,2,4", param=name)
    return counts
