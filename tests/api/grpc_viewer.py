"""A real client of one gRPC session, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from tests.api.grpc_fakes import Refusal, Served, refusal_of
from tests.api.session_fakes import FakeSession

OPEN = pb.VideoSpec(prompt="a lake", width=64, height=64)


class Viewer:
    """A client of one session."""

    def __init__(self, served: Served, call: Any) -> None:
        self.served = served
        self.call = call
        self.segments: list[pb.Segment] = []
        self.kinds: list[str] = []
        self.id = ""

    async def send(self, event_id: str = "", **event: Any) -> None:
        await self.call.write(pb.SessionRequest(event_id=event_id, **event))

    async def next(self) -> Any:
        async with asyncio.timeout(10):
            message = await self.call.read()
        if message is grpc.aio.EOF:
            return None
        kind = message.WhichOneof("event")
        self.kinds.append(kind)
        if kind == "segment":
            self.segments.append(message.segment)
        elif kind == "started":
            self.id = message.started.video.id
        return message

    async def until(self, kind: str) -> Any:
        """Reads on to the next message of a kind, and returns what is in it."""
        while True:
            message = await self.next()
            assert message is not None, (await self.call.code(), await self.call.details())
            if message.WhichOneof("event") == kind:
                return getattr(message, kind)

    async def to_end(self) -> grpc.StatusCode:
        while await self.next() is not None:
            pass
        code: grpc.StatusCode = await self.call.code()
        return code

    async def refusal(self) -> Refusal:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.to_end()
        return refusal_of(caught.value)

    @property
    def session(self) -> FakeSession:
        return [each for each in self.served.service.sessions if each.job.id == self.id][-1]


@asynccontextmanager
async def started(served: Served, **start: Any) -> AsyncIterator[Viewer]:
    """A viewer whose session is started."""
    viewer = Viewer(served, served.stub.Session())
    await viewer.send(start=pb.SessionStart(**{"spec": OPEN, **start}))
    await viewer.until("started")
    yield viewer
    viewer.call.cancel()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)
