"""All of it, one command after the other: `python -m tools.tiny_checkpoint.build`. Goes on where it was interrupted.

Knows the order, and how the time that is given is shared; knows nothing else.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from tools.tiny_checkpoint.export import write_trained_checkpoint
from tools.tiny_checkpoint.latents import LATENTS_FILE, encode_clips
from tools.tiny_checkpoint.presets import Preset
from tools.tiny_checkpoint.progress import Run, options
from tools.tiny_checkpoint.train_flow import train_flow
from tools.tiny_checkpoint.train_vae import train_vae

_VAE_SHARE = 0.35
"""Of the seconds that are given, where the VAE is trained; to encode the clips and to export take their own."""


def main() -> None:
    """The command."""
    told = options("Trains and writes the small checkpoint.")
    print(f"wrote {build(told.preset, told.run)}")


def build(preset: Preset, run: Run) -> Path:
    """Trains what is not trained yet and writes the checkpoint anew; returns its directory."""
    if run.has_new_vae:
        train_vae(preset.vae, _with_share(run, _VAE_SHARE))
    if not (run.work / LATENTS_FILE).is_file():
        encode_clips(preset, replace(run, max_s=None))
    train_flow(preset, _with_share(run, 1 - _VAE_SHARE if run.has_new_vae else 1))
    out = run.work / "checkpoint"
    shutil.rmtree(out, ignore_errors=True)
    write_trained_checkpoint(preset, run.work, out)
    return out


def _with_share(run: Run, share: float) -> Run:
    return run if run.max_s is None else replace(run, max_s=share * run.max_s)


if __name__ == "__main__":
    main()
