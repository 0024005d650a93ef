"""What surrounds every gRPC call: reading its messages, its caller, its request id, its count, and the status that it
ends with. Also ends calls when the server does. Knows no video.

Messages are parsed here rather than by gRPC, which answers bytes that are no message as if the server had failed; and
they are read as streams, also where there is one, as gRPC would take it in before anybody knows who sends it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Never, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from helios_serve.api.auth import AccessError, Caller, grpc_peer_host
from helios_serve.api.grpc_access import CallHeaders, GrpcAccess, read_headers
from helios_serve.api.grpc_errors import status_code, status_message, trailers
from helios_serve.api.grpc_wire import parse_message
from helios_serve.api.intake import draining
from helios_serve.api.keys import Scope
from helios_serve.api.middleware import InternalError
from helios_serve.errors import HeliosError, InvalidRequestError
from helios_serve.logs import Access, bind_request_id, log_access
from helios_serve.telemetry import AUTH_FAILURES, Metrics
from helios_serve.tracing import NoTracing, Span, Tracing, bind_context

logger = logging.getLogger(__name__)

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
_CODES: Mapping[str, int] = {code.name: code.value[0] for code in grpc.StatusCode}
END_S = 1.0
"""What a call that is ended gets to say so."""


class Call:
    """One call that was let in. `ending`: why the server ends it before its time."""

    def __init__(self, caller: Caller, headers: CallHeaders, task: asyncio.Task[Any]) -> None:
        self.caller = caller
        self.headers = headers
        self.ending: HeliosError | None = None
        self._task = task

    def end(self, error: HeliosError) -> None:
        """Ends the call with this status, even while it waits for a client that does not read."""
        if self.ending is None:
            self.ending = error
            self._task.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class UnaryMethod:
    """One request, one answer. scope: what the caller's key must have. takes_media: whether a request may be large."""

    scope: Scope
    answer: Callable[[Any, Call], Awaitable[Message]]
    takes_media: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamMethod:
    """One request, many answers."""

    scope: Scope
    answer: Callable[[Any, Call], AsyncGenerator[Message, None]]
    takes_media: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogueMethod:
    """Many requests, of which the first may be large, and many answers. Ends as soon as the server does, for it can be
    gone on with elsewhere."""

    scope: Scope
    answer: Callable[[AsyncIterator[Any], Call], AsyncGenerator[Message, None]]


Method = UnaryMethod | StreamMethod | DialogueMethod


class Boundary:
    """One for each server. Every call leaves a count, a line in the log and a span."""

    def __init__(self, access: GrpcAccess, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._access = access
        self._metrics = metrics
        self._tracing = NoTracing() if tracing is None else tracing
        self._is_refusing = False
        self._running: dict[asyncio.Task[Any], Call | None] = {}
        self._dialogues: set[Call] = set()

    def handler(self, service: ServiceDescriptor, methods: Mapping[str, Method]) -> grpc.GenericRpcHandler:
        """Answers the calls of `service`; every one of its methods has to be there."""
        handlers = {each.name: self._method(each, methods[each.name]) for each in service.methods}
        return grpc.method_handlers_generic_handler(service.full_name, handlers)

    @property
    def num_open_calls(self) -> int:
        return len(self._running)

    def refuse(self) -> None:
        """Lets no more calls in."""
        self._is_refusing = True

    async def finish(self, grace_s: float) -> None:
        """Ends all calls: dialogues now, the others when they do not end by themselves within `grace_s`."""
        self.refuse()
        for call in [*self._dialogues]:
            call.end(draining())
        await self._wait(grace_s)
        for open_call in [*self._running.values()]:
            if open_call is not None:
                open_call.end(draining())
        await self._wait(END_S)

    async def _wait(self, seconds: float) -> None:
        if self._running:
            await asyncio.wait([*self._running], timeout=seconds)

    def _method(self, described: MethodDescriptor, method: Method) -> grpc.RpcMethodHandler[Any, Any]:
        kind, name = GetMessageClass(described.input_type), described.full_name

        async def unary(raws: AsyncIterator[bytes], context: Context) -> Message:
            async def work(call: Call) -> Message:
                assert isinstance(method, UnaryMethod)
                return await method.answer(await _only_parsed(kind, raws, method.takes_media), call)

            return await self._run(context, name, method.scope, work)

        async def stream(raws: AsyncIterator[bytes], context: Context) -> None:
            async def work(call: Call) -> None:
                assert isinstance(method, StreamMethod)
                request = await _only_parsed(kind, raws, method.takes_media)
                await _write_all(method.answer(request, call), context)

            await self._run(context, name, method.scope, work)

        async def dialogue(raws: AsyncIterator[bytes], context: Context) -> None:
            async def work(call: Call) -> None:
                assert isinstance(method, DialogueMethod)
                self._dialogues.add(call)
                try:
                    await _write_all(method.answer(_all_parsed(kind, raws), call), context)
                finally:
                    self._dialogues.discard(call)

            await self._run(context, name, method.scope, work)

        if isinstance(method, UnaryMethod):
            return grpc.stream_unary_rpc_method_handler(unary, None, _serialized)
        answered = stream if isinstance(method, StreamMethod) else dialogue
        return grpc.stream_stream_rpc_method_handler(answered, None, _serialized)

    async def _run(self, context: Context, name: str, scope: Scope, work: Callable[[Call], Awaitable[T]]) -> T:
        """One call from its first byte to its status."""
        task = asyncio.current_task()
        assert task is not None
        headers, status = read_headers(context.invocation_metadata() or ()), "OK"
        call: Call | None = None
        self._running[task] = None
        record = self._begin(name, headers, context)
        with bind_request_id(headers.request_id), bind_context(record.span.context):
            try:
                await context.send_initial_metadata((("x-request-id", headers.request_id),))
                if self._is_refusing:
                    raise draining()
                call = Call(await self._access.caller(headers, context.peer(), scope), headers, task)
                self._running[task] = call
                return await work(call)
            except HeliosError as error:
                status = error.grpc_status
                self._note_refusal(error)
                await _abort(context, error)
            except asyncio.CancelledError:
                if call is None or call.ending is None or context.cancelled():
                    status = _left(context)
                    raise
                status = call.ending.grpc_status
                await _abort(context, call.ending)
            except grpc.aio.InternalError:
                status = _left(context)
                logger.info("%s: the client was gone before it had its answer", name)
                raise asyncio.CancelledError from None
            except Exception:
                status = InternalError.grpc_status
                logger.exception("%s failed", name)
                await _abort(
                    context, InternalError("a defect of the server; its log has the cause under this call's id")
                )
            finally:
                del self._running[task]
                record.end(self._metrics, status)

    def _begin(self, name: str, headers: CallHeaders, context: Context) -> _Record:
        service, _, method = name.rpartition(".")
        span = self._tracing.begin(
            f"{service}/{method}",
            parent=headers.trace,
            kind="server",
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        )
        return _Record(
            service=service, method=method, span=span, peer=grpc_peer_host(context.peer()), started_s=time.monotonic()
        )

    def _note_refusal(self, error: HeliosError) -> None:
        if isinstance(error, AccessError) and error.code in AUTH_FAILURES:
            self._metrics.auth_failed(error.code)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """What is told of a call when it has ended."""

    service: str
    method: str
    span: Span
    peer: str
    started_s: float

    def end(self, metrics: Metrics, status: str) -> None:
        metrics.grpc_request(self.service, self.method, status)
        path, seconds = f"/{self.service}/{self.method}", time.monotonic() - self.started_s
        log_access(
            Access(method="GRPC", path=path, template=path, status=status, seconds=seconds, client=self.peer or None)
        )
        code = _CODES[status]
        is_fault = status in ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNIMPLEMENTED", "DEADLINE_EXCEEDED")
        self.span.end(error=status if is_fault else None, attributes={"rpc.grpc.status_code": code})


async def undone_if_left(work: Awaitable[T], undo: Callable[[T], Awaitable[None]]) -> T:
    """The result of `work`, which goes on when the client leaves meanwhile, and is undone then. Raises: as `work`."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with suppress(HeliosError):
            await undo(await task)
        raise


async def _abort(context: Context, error: HeliosError) -> Never:
    await context.abort(status_code(error), status_message(error), trailers(error))


async def _write_all(messages: AsyncGenerator[Message, None], context: Context) -> None:
    """Writes at the client's pace. Whatever ends it, `messages` is closed before the call is."""
    async with aclosing(messages):
        async for message in messages:
            await context.write(message)


async def _only_parsed(kind: type[Message], raws: AsyncIterator[bytes], may_hold_media: bool) -> Message:
    """The request of a call that has one."""
    async for raw in raws:
        return parse_message(kind, raw, may_hold_media=may_hold_media)
    raise InvalidRequestError(f"message: no {kind.DESCRIPTOR.full_name} was sent", code="malformed_body")


async def _all_parsed(kind: type[Message], raws: AsyncIterator[bytes]) -> AsyncGenerator[Message, None]:
    is_first = True
    async for raw in raws:
        yield parse_message(kind, raw, may_hold_media=is_first)
        is_first = False


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


def _left(context: Context) -> str:
    """The status that stands for a client that did not wait for one."""
    left_s = context.time_remaining()
    return "DEADLINE_EXCEEDED" if left_s is not None and left_s <= 0 else "CANCELLED"
