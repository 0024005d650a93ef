"""helios_serve: a serving engine for real-time long video generation with Helios."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helios_serve.offline import Helios

__all__ = ["Helios", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Loads `Helios` on first use, so that importing the package costs nothing."""
    if name == "Helios":
        from helios_serve.offline import Helios

        return Helios
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
