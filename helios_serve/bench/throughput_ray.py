"""Whole videos through the engine and the workers of a Ray cluster, without an API: so many at once, timed together.

Knows the engine and its events; knows no flags and prints nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing

from helios_serve.bench.rank_work import Workload, requests_of
from helios_serve.config import EngineConfig, ExecutorConfig, ModelConfig
from helios_serve.engine.async_engine import AsyncEngine
from helios_serve.errors import GenerationError
from helios_serve.executors import cost_model, on_cluster
from helios_serve.telemetry import Metrics
from helios_serve.tracing import open_tracing
from helios_serve.types import Failure, ModelInfo, VideoRequest


class ClusterEngine:
    """A checkpoint on workers of a Ray cluster; used as a context. Workers stay for all that is run in it.

    Raises: as `on_cluster`.
    """

    def __init__(self, model: ModelConfig, ray: ExecutorConfig) -> None:
        self.ray = ray
        config, executor = on_cluster(model, ray)
        self.info: ModelInfo = config.info(model.served_name)
        costs = cost_model(config, model.device, is_shared=False)
        # Loads are closed: nothing is to be refused, however slow the machine.
        self._engine = AsyncEngine(
            executor, costs, EngineConfig().patient(), Metrics(self.info.name), open_tracing(None, version="0")
        )
        self._loop = asyncio.Runner()

    def __enter__(self) -> ClusterEngine:
        async def start() -> None:
            await self._engine.start()
            await self._engine.wait_ready()

        try:
            self._loop.run(start())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._loop:
            self._loop.run(self._engine.close())

    def requests(self, workload: Workload) -> list[VideoRequest]:
        """Raises: InvalidRequestError when the checkpoint cannot make such videos."""
        return requests_of(workload, self.info)

    def seconds(self, requests: Sequence[VideoRequest]) -> float:
        """From the first prompt to the last segment of all of them, made at the same time.

        Raises: GenerationError when one fails.
        """

        async def make_all() -> float:
            began = time.perf_counter()
            try:
                async with asyncio.TaskGroup() as group:
                    for request in requests:
                        group.create_task(self._make(request))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            return time.perf_counter() - began

        return self._loop.run(make_all())

    async def _make(self, request: VideoRequest) -> None:
        async with aclosing(self._engine.run(request)) as events:
            async for event in events:
                if isinstance(event, Failure):
                    raise GenerationError(event.message, code=event.code)
