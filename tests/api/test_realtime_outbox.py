"""The queue in front of a WebSocket: what waits, what is dropped, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from helios_serve.api.realtime_outbox import MAX_WAITING, Closing, Outbox

END = Closing(code=1000)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(10):
            await scenario()

    asyncio.run(main())


async def waits(put: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """The task of a `put` that has to wait."""
    task = asyncio.create_task(put)
    await asyncio.sleep(0.02)
    assert not task.done()
    return task


def test_frames_leave_in_order_and_together() -> None:
    async def scenario() -> None:
        outbox = Outbox(100)
        await outbox.put("a")
        await outbox.put("b", b"c")
        await outbox.close(END)
        assert [await outbox.get() for _ in range(3)] == [("a",), ("b", b"c"), END]

    run(scenario)


def test_binary_frames_wait_for_room_and_text_does_not() -> None:
    async def scenario() -> None:
        outbox = Outbox(100)
        await outbox.put("m", bytes(60))
        late = await waits(outbox.put("m", bytes(41)))
        await outbox.put("receipt")
        assert await outbox.get() == ("m", bytes(60))
        await late
        assert await outbox.get() == ("receipt",)

    run(scenario)


def test_a_frame_larger_than_all_room_passes_alone() -> None:
    async def scenario() -> None:
        outbox = Outbox(100)
        await outbox.put(bytes(1000))
        late = await waits(outbox.put(bytes(1)))
        assert await outbox.get() == (bytes(1000),)
        await late

    run(scenario)


def test_messages_wait_too_when_there_are_many() -> None:
    async def scenario() -> None:
        outbox = Outbox(100)
        for number in range(MAX_WAITING):
            await outbox.put(str(number))
        late = await waits(outbox.put("late"))
        await outbox.get()
        await late

    run(scenario)


def test_what_is_soon_out_of_date_is_dropped_while_others_wait() -> None:
    async def scenario() -> None:
        outbox = Outbox(100)
        for number in range(MAX_WAITING):
            await outbox.offer(str(number))
        await outbox.close(END)
        sent = []
        while (item := await outbox.get()) != END:
            sent.append(item)
        assert sent == [(str(number),) for number in range(MAX_WAITING // 4)]

    run(scenario)


@pytest.mark.parametrize(("at_once", "left"), [(False, [("a",), END]), (True, [END])])
def test_its_end_is_behind_what_waits_or_at_once(at_once: bool, left: list[object]) -> None:
    async def scenario() -> None:
        outbox = Outbox(100)
        await outbox.put("a")
        await outbox.close(END, at_once=at_once)
        await outbox.close(Closing(code=1011))
        await outbox.put("b")
        await outbox.offer("c")
        assert outbox.is_closing
        assert [await outbox.get() for _ in left] == left
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await outbox.get()

    run(scenario)


def test_its_end_wakes_who_waits_for_room() -> None:
    async def scenario() -> None:
        outbox = Outbox(10)
        await outbox.put(bytes(10))
        late = await waits(outbox.put(bytes(10)))
        await outbox.close(END)
        await late
        assert [await outbox.get() for _ in range(2)] == [(bytes(10),), END]

    run(scenario)
