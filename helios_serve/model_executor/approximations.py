"""Where the named approximations can be used. Knows solvers and numbers of ranks; what each one does is in
`history_reuse` and `step_cache`."""

from __future__ import annotations

from collections.abc import Collection

from helios_serve.errors import CheckpointError
from helios_serve.model_executor.model_config import Solver
from helios_serve.types import Approximation


def check_approximations(
    names: Collection[Approximation], solver: Solver, *, num_ranks: int = 1, cfg_degree: int = 1
) -> None:
    """Whether a checkpoint of that solver, on such ranks, can make them.

    Args:
        cfg_degree: over how many ranks the sequences of a forward are dealt out.

    Raises: CheckpointError with what would be right.
    """
    if "history_reuse" in names and cfg_degree > 1:
        raise CheckpointError(
            f"history_reuse: not with a cfg degree of {cfg_degree}, as each rank keeps the history of the sequences "
            "that it was dealt; give degree 1, or leave it out",
            param="approximations",
        )
    if "step_cache" in names and solver == "dmd":
        raise CheckpointError(
            "step_cache: a Distilled checkpoint has too few steps to leave any out; it is for Base and Mid",
            param="approximations",
        )
    if "step_cache" in names and num_ranks > 1:
        raise CheckpointError(
            f"step_cache: needs all tokens of a forward on one rank, not on {num_ranks}; give one, or leave it out",
            param="approximations",
        )
