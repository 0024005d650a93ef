"""Delivers events to webhooks: signs them, sends them, and tries again for two days.

A delivery that was claimed and not settled, because the process went, is claimed again by whoever looks next: a
receiver may get an event twice, and knows it by its `webhook-id`. Knows the rows of deliveries, which are written where
jobs end; knows no HTTP surface.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

from standardwebhooks import Webhook

from helios_serve.api.outgoing import Outgoing, OutgoingError
from helios_serve.api.signed_urls import SigningKey, SigningKeys
from helios_serve.errors import HeliosError, InvalidRequestError, NotFoundError
from helios_serve.store.access import Access
from helios_serve.store.records import Delivery, WebhookEndpoint
from helios_serve.telemetry import Metrics

logger = logging.getLogger(__name__)

EventType = Literal["video.completed", "video.failed"]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
RETRY_LADDER_S = (5.0, 30.0, 300.0, 1800.0, 7200.0, 21_600.0, 43_200.0, 86_400.0)
ROTATION_S = 86_400.0
"""How long the old secret signs beside the new one."""

GONE = 410
_PREFIX = "whsec_"
_STORE_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderSettings:
    """How to send.

    ladder_s: the waits after each failed attempt; after one more the delivery is a dead letter. jitter: the part of a
    wait that is added at random at most. timeout_s: of one attempt; hold_s: after which an attempt that was never
    settled is made again. poll_s: how often other processes' events are looked for.
    """

    ladder_s: Sequence[float] = RETRY_LADDER_S
    jitter: float = 0.2
    timeout_s: float = 10.0
    hold_s: float = 60.0
    poll_s: float = 2.0
    max_parallel: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What a receiver made of an event. status: None when no answer came, and `problem` says why."""

    status: int | None
    problem: str = ""
    is_forbidden: bool = False

    @property
    def is_delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class WebhookSender:
    """One for each process; several may share a store. `now`: seconds of the Unix clock, for timestamps."""

    def __init__(
        self,
        access: Access,
        outgoing: Outgoing,
        keys: SigningKeys,
        *,
        settings: SenderSettings | None = None,
        metrics: Metrics | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._access = access
        self._outgoing = outgoing
        self._keys = keys
        self._settings = SenderSettings() if settings is None else settings
        self._metrics = metrics
        self._now = now
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Says that a delivery may be due: a job has ended, or one is sent again. On the event loop."""
        self._woken.set()

    async def run(self) -> None:
        """Sends what is due until it is cancelled; attempts under way are then given up and made again later."""
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                self._woken.clear()
                for delivery in await self._due(self._settings.max_parallel - len(running)):
                    task = asyncio.create_task(self._settle(delivery), name=f"webhook {delivery.id}")
                    running.add(task)
                    task.add_done_callback(running.discard)
                    task.add_done_callback(lambda _: self.wake())
                await self._pause()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def test(self, endpoint: WebhookEndpoint, event_type: EventType) -> Attempt:
        """Sends a sample event now and once."""
        delivery = Delivery(
            id="",
            tenant=endpoint.tenant,
            event_id=f"evt_test_{secrets.token_hex(12)}",
            event_type=event_type,
            job_id="video_00000000000000000000000000",
            endpoint_id=endpoint.id,
            url=endpoint.url,
            key_id=None,
            state="pending",
            attempt=1,
            next_at=self._now(),
            last_status=None,
            created_at=self._now(),
        )
        return await self._send(delivery, endpoint.url, self.secrets_of_endpoint(endpoint))

    def check(self, url: str, param: str) -> None:
        """What can be said of a receiver's address before anything is sent. Raises InvalidRequestError."""
        try:
            self._outgoing.check(url)
        except OutgoingError as error:
            raise InvalidRequestError(f"{param}: {error.message}", param=param) from None

    def secrets_of_endpoint(self, endpoint: WebhookEndpoint) -> list[str]:
        """What signs for an endpoint: its secret, and the one before it while the rotation is young."""
        if endpoint.previous_secret is None or endpoint.rotated_at is None:
            return [endpoint.secret]
        is_young = self._now() - endpoint.rotated_at < ROTATION_S
        return [endpoint.secret, endpoint.previous_secret] if is_young else [endpoint.secret]

    async def secrets_of_key(self, key_id: str | None) -> list[str]:
        """What signs for the `webhook_url` of a job that was made with this key: the secret that the store keeps with
        the key, or else one that follows from the server's signing keys; two while these rotate."""
        stored = {key.id: key.webhook_secret for key in await self._access.keys()}
        secret = None if key_id is None else stored.get(key_id)
        if secret is not None:
            return [secret]
        return [derived_secret(key, key_id) for key in self._keys.in_order[:2]]

    async def _due(self, limit: int) -> list[Delivery]:
        if limit == 0:
            return []
        try:
            return await self._access.due_deliveries(limit, hold_s=self._settings.hold_s)
        except HeliosError as error:
            logger.warning("webhooks wait: %s", error.message)
            await asyncio.sleep(_STORE_PAUSE_S)
            return []

    async def _pause(self) -> None:
        """Until something may be due."""
        try:
            async with asyncio.timeout(self._settings.poll_s):
                await self._woken.wait()
        except TimeoutError:
            return

    async def _settle(self, delivery: Delivery) -> None:
        """One attempt, and what it means for the row. What goes wrong here is logged; the row is due again later."""
        try:
            await self._attempt(delivery)
        except HeliosError as error:
            logger.warning("webhook %s: %s", delivery.id, error.message)
        except Exception:
            logger.exception("webhook %s: a defect", delivery.id)

    async def _attempt(self, delivery: Delivery) -> None:
        url, signers = delivery.url, []
        if delivery.endpoint_id is not None:
            try:
                endpoint = await self._access.endpoint(delivery.tenant, delivery.endpoint_id)
            except NotFoundError:
                return  # deleted, and its deliveries with it
            if endpoint.is_disabled:
                await self._access.undelivered(delivery.id, status=delivery.last_status, retry_in_s=None)
                return
            url, signers = endpoint.url, self.secrets_of_endpoint(endpoint)
        else:
            signers = await self.secrets_of_key(delivery.key_id)
        attempt = await self._send(delivery, url, signers)
        if attempt.status is not None and attempt.is_delivered:
            await self._access.delivered(delivery.id, attempt.status)
            self._count("delivered")
            return
        await self._note_failure(delivery, attempt)

    async def _send(self, delivery: Delivery, url: str, signers: Sequence[str]) -> Attempt:
        body, headers = signed(delivery, signers, self._now())
        try:
            status = await self._outgoing.post(url, body, headers, timeout_s=self._settings.timeout_s)
        except OutgoingError as error:
            return Attempt(status=None, problem=error.message, is_forbidden=error.reason == "forbidden")
        return Attempt(status=status)

    async def _note_failure(self, delivery: Delivery, attempt: Attempt) -> None:
        if attempt.status == GONE and delivery.endpoint_id is not None:
            await self._access.change_endpoint(delivery.tenant, delivery.endpoint_id, {"is_disabled": True})
            logger.warning("webhook endpoint %s: gone (410), disabled", delivery.endpoint_id)
        is_final = attempt.status == GONE or attempt.is_forbidden or delivery.attempt > len(self._settings.ladder_s)
        retry_in_s = None if is_final else self._wait_s(delivery.attempt)
        await self._access.undelivered(delivery.id, status=attempt.status, retry_in_s=retry_in_s)
        self._count("dead" if is_final else "failed")
        logger.info(
            "webhook %s: attempt %d failed (%s); %s",
            delivery.id,
            delivery.attempt,
            attempt.problem or f"status {attempt.status}",
            "no more attempts" if retry_in_s is None else f"the next one in {retry_in_s:.0f} s",
        )

    def _wait_s(self, attempt: int) -> float:
        return self._settings.ladder_s[attempt - 1] * (1 + random.uniform(0, self._settings.jitter))

    def _count(self, outcome: Literal["delivered", "failed", "dead"]) -> None:
        if self._metrics is not None:
            self._metrics.webhook_delivery(outcome)


def signed(delivery: Delivery, signers: Sequence[str], now: float) -> tuple[bytes, dict[str, str]]:
    """The body of an event, the same in every attempt, and its headers by https://www.standardwebhooks.com."""
    event = {
        "id": delivery.event_id,
        "object": "event",
        "type": delivery.event_type,
        "created_at": int(delivery.created_at),
        "data": {"id": delivery.job_id},
    }
    body = json.dumps(event, separators=(",", ":"))
    at = datetime.fromtimestamp(int(now), tz=UTC)
    headers = {
        "content-type": "application/json",
        "webhook-id": delivery.event_id,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": " ".join(Webhook(one).sign(delivery.event_id, at, body) for one in signers),
    }
    return body.encode(), headers


def new_secret() -> str:
    """A secret for an endpoint, as its owner gets it."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def derived_secret(key: SigningKey, key_id: str | None) -> str:
    """The webhook secret of an API key that has none of its own; None: of a server without keys."""
    label = f"helios_serve webhook secret {key_id or ''}"
    return _PREFIX + base64.b64encode(hmac.digest(key.secret, label.encode(), "sha256")).decode()
