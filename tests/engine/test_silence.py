"""How long the engine's own timer did not run: what /live asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import cast

from helios_serve.config import EngineConfig
from helios_serve.engine.async_engine import TICK_S, AsyncEngine
from helios_serve.engine.executor import Executor
from helios_serve.engine.step_cost import CPU_PRIOR, CostModel, ModelShape
from helios_serve.telemetry import Metrics
from helios_serve.types import ExecutorEvent


class NoWorkers:
    """An executor none of whose groups comes up."""

    def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        pass

    def close(self, drain_s: float) -> None:
        pass


def test_silence_is_counted_while_the_engine_runs() -> None:
    shape = ModelShape(dim=64, ffn_dim=128, num_layers=2, patch=(1, 2, 2), spatial_scale=8)
    executor = cast(Executor, NoWorkers())

    async def main() -> None:
        engine = AsyncEngine(executor, CostModel(shape, CPU_PRIOR), EngineConfig(), Metrics("m"))
        assert engine.silent_s == 0
        await engine.start()
        time.sleep(2 * TICK_S)  # nothing else runs on this loop meanwhile
        assert engine.silent_s >= 2 * TICK_S
        for _ in range(100):
            if engine.silent_s < TICK_S:
                break
            await asyncio.sleep(0.01)
        assert engine.silent_s < TICK_S
        await engine.close()
        assert engine.silent_s == 0

    asyncio.run(main())
