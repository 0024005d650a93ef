"""The JSON of the webhook routes, shaped as OpenAI's: bodies, answers, and the rows they are made from."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from helios_serve.api.outgoing import MAX_URL
from helios_serve.api.webhooks import EVENT_TYPES, EventType
from helios_serve.store.records import Delivery, WebhookEndpoint

Url = Annotated[str, Field(min_length=1, max_length=MAX_URL)]
Name = Annotated[str, Field(min_length=1, max_length=64)]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=len(EVENT_TYPES))]


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class EndpointBody(_Input):
    """A new receiver; without `event_types` it gets all of them."""

    url: Url
    event_types: EventTypes | None = None
    name: Name | None = None


class EndpointState(_Input):
    """Whether nothing is sent to a receiver; one that answered 410 is disabled by the server."""

    disabled: bool


class EndpointChanges(_Input):
    """What is to be different."""

    url: Url | None = None
    event_types: EventTypes | None = None
    name: Name | None = None
    helios: EndpointState | None = None


class RotateBody(_Input):
    """Whether events are signed with the old secret too for a day."""

    keep_old_secret_active_for_24_hours: bool = True


class SampleBody(_Input):
    """The type of the sample event."""

    event_type: EventType = "video.completed"


class EndpointDetails(BaseModel):
    """What OpenAI's object has no place for."""

    disabled: bool
    rotated_at: int | None


class Endpoint(BaseModel):
    """A receiver. `name` is what its owner calls it, else its host."""

    id: str
    object: Literal["webhook_endpoint"]
    created_at: int
    event_types: list[str]
    name: str
    url: str
    signing_secret_hint: str
    helios: EndpointDetails


class EndpointWithSecret(Endpoint):
    """A receiver with its secret, which is shown this once."""

    signing_secret: str


class EndpointList(BaseModel):
    """A page of receivers; ask for the next one with `after` = `last_id`."""

    object: Literal["list"]
    data: list[Endpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


class EndpointDeleted(BaseModel):
    """The receiver and what was to be sent to it are gone."""

    id: str
    object: Literal["webhook_endpoint.deleted"]
    deleted: Literal[True]


class SampleResult(BaseModel):
    """What the receiver answered to a sample event."""

    object: Literal["webhook_endpoint.test"]
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True]


class EventTypeList(BaseModel):
    """The types of events that are sent."""

    object: Literal["list"]
    data: list[str]


class SigningSecret(BaseModel):
    """What signs events for the `webhook_url` of jobs that the caller's key made."""

    object: Literal["webhook_secret"]
    signing_secret: str


class DeliveryObject(BaseModel):
    """One event for one receiver. `dead`: there are no more attempts, unless it is sent again."""

    id: str
    object: Literal["webhook_delivery"]
    event_id: str
    event_type: str
    video_id: str
    webhook_endpoint_id: str | None
    url: str
    state: Literal["pending", "delivered", "dead"]
    attempts: int
    next_attempt_at: int | None
    last_status: int | None
    created_at: int


class DeliveryList(BaseModel):
    """A page of deliveries; ask for the next one with `after` = `last_id`."""

    object: Literal["list"]
    data: list[DeliveryObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def endpoint_object(row: WebhookEndpoint) -> Endpoint:
    return Endpoint(
        id=row.id,
        object="webhook_endpoint",
        created_at=int(row.created_at),
        event_types=list(row.event_types or EVENT_TYPES),
        name=row.name or urlsplit(row.url).hostname or row.url,
        url=row.url,
        signing_secret_hint=f"whsec_...{row.secret[-4:]}",
        helios=EndpointDetails(
            disabled=row.is_disabled,
            rotated_at=None if row.rotated_at is None else int(row.rotated_at),
        ),
    )


def endpoint_with_secret(row: WebhookEndpoint) -> EndpointWithSecret:
    return EndpointWithSecret(**endpoint_object(row).model_dump(), signing_secret=row.secret)


def delivery_object(row: Delivery) -> DeliveryObject:
    return DeliveryObject(
        id=row.id,
        object="webhook_delivery",
        event_id=row.event_id,
        event_type=row.event_type,
        video_id=row.job_id,
        webhook_endpoint_id=row.endpoint_id,
        url=row.url,
        state=row.state,
        attempts=row.attempt,
        next_attempt_at=int(row.next_at) if row.state == "pending" else None,
        last_status=row.last_status,
        created_at=int(row.created_at),
    )
