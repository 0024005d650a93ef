"""Logging of the process."""

from __future__ import annotations

import logging


def configure_logging(level: int = logging.INFO) -> None:
    """One line per record on standard error, with time, level and module."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
