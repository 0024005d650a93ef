"""Receivers of events and what was sent to them. Translates to the store and `WebhookSender`, and back."""

from __future__ import annotations

import secrets
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from helios_serve.api.auth import Caller
from helios_serve.api.http_access import HttpAccess
from helios_serve.api.json_body import read_json, request_body
from helios_serve.api.pages import add_get, error_answers, page_request
from helios_serve.api.webhook_schemas import (
    DeliveryList,
    DeliveryObject,
    Endpoint,
    EndpointBody,
    EndpointChanges,
    EndpointDeleted,
    EndpointList,
    EndpointWithSecret,
    EventTypeList,
    RotateBody,
    SampleBody,
    SampleResult,
    SigningSecret,
    delivery_object,
    endpoint_object,
    endpoint_with_secret,
)
from helios_serve.api.webhooks import EVENT_TYPES, WebhookSender, new_secret
from helios_serve.errors import InvalidRequestError, QuotaError
from helios_serve.store.access import Access
from helios_serve.store.paging import PageRequest

ENDPOINTS = "/v1/webhook_endpoints"
DELIVERIES = "/v1/webhook_deliveries"
MAX_ENDPOINTS = 20
"""Of one tenant: each of them is sent every event."""

_SECRET_HEADERS = {"cache-control": "no-store"}


def webhook_router(rows: Access, sender: WebhookSender, access: HttpAccess) -> APIRouter:
    """The routes; all of them want the scope webhooks."""
    routes = _Routes(rows, sender, access)
    router = APIRouter(tags=["webhooks"])
    one = f"{ENDPOINTS}/{{endpoint_id}}"
    _add_post(router, ENDPOINTS, routes.create, EndpointWithSecret, EndpointBody)
    add_get(router, ENDPOINTS, routes.endpoints, EndpointList, 400, 404)
    add_get(router, one, routes.endpoint, Endpoint, 404)
    _add_post(router, one, routes.change, Endpoint, EndpointChanges)
    router.add_api_route(
        one, routes.delete, methods=["DELETE"], response_model=EndpointDeleted, responses=error_answers(404)
    )
    _add_post(router, f"{one}/rotate_secret", routes.rotate, EndpointWithSecret, RotateBody)
    _add_post(router, f"{one}/test", routes.test, SampleResult, SampleBody)
    add_get(router, "/v1/webhook_event_types", routes.event_types, EventTypeList)
    add_get(router, "/v1/webhook_secret", routes.signing_secret, SigningSecret)
    add_get(router, DELIVERIES, routes.deliveries, DeliveryList, 400, 404)
    _add_post(router, f"{DELIVERIES}/{{delivery_id}}/resend", routes.resend, DeliveryObject, None)
    return router


class _Routes:
    """One method per route."""

    def __init__(self, rows: Access, sender: WebhookSender, access: HttpAccess) -> None:
        self._rows = rows
        self._sender = sender
        self._access = access

    async def create(self, request: Request) -> Response:
        caller = await self._caller(request)
        body = await read_json(request, EndpointBody)
        self._sender.check(body.url, "url")
        page = await self._rows.endpoints(caller.tenant, PageRequest(limit=MAX_ENDPOINTS))
        if len(page.items) == MAX_ENDPOINTS:
            raise QuotaError(f"{MAX_ENDPOINTS} webhook endpoints, as many as are allowed; delete one first")
        row = await self._rows.add_endpoint(
            endpoint_id=f"we_{secrets.token_hex(12)}",
            tenant_id=caller.tenant,
            url=body.url,
            secret=new_secret(),
            event_types=body.event_types or (),
            name=body.name,
        )
        return _answer(endpoint_with_secret(row), _SECRET_HEADERS)

    async def endpoints(
        self, request: Request, after: str | None = None, limit: int = 20, order: str = "desc"
    ) -> Response:
        caller = await self._caller(request)
        page = await self._rows.endpoints(caller.tenant, page_request(after, limit, order))
        data = [endpoint_object(row) for row in page.items]
        first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
        return _answer(
            EndpointList(object="list", data=data, first_id=first_id, last_id=last_id, has_more=page.has_more)
        )

    async def endpoint(self, request: Request, endpoint_id: str) -> Response:
        caller = await self._caller(request)
        return _answer(endpoint_object(await self._rows.endpoint(caller.tenant, endpoint_id)))

    async def change(self, request: Request, endpoint_id: str) -> Response:
        caller = await self._caller(request)
        body = await read_json(request, EndpointChanges)
        changes: dict[str, object] = {}
        if body.url is not None:
            self._sender.check(body.url, "url")
            changes["url"] = body.url
        if body.event_types is not None:
            changes["event_types"] = body.event_types
        if body.helios is not None:
            changes["is_disabled"] = body.helios.disabled
        if body.name is not None:
            changes["name"] = body.name
        if changes:
            row = await self._rows.change_endpoint(caller.tenant, endpoint_id, changes)
        else:
            row = await self._rows.endpoint(caller.tenant, endpoint_id)
        return _answer(endpoint_object(row))

    async def delete(self, request: Request, endpoint_id: str) -> Response:
        caller = await self._caller(request)
        await self._rows.delete_endpoint(caller.tenant, endpoint_id)
        return _answer(EndpointDeleted(id=endpoint_id, object="webhook_endpoint.deleted", deleted=True))

    async def rotate(self, request: Request, endpoint_id: str) -> Response:
        caller = await self._caller(request)
        body = await read_json(request, RotateBody, is_optional=True)
        row = await self._rows.rotate_secret(caller.tenant, endpoint_id, new_secret())
        if not body.keep_old_secret_active_for_24_hours:
            row = await self._rows.change_endpoint(caller.tenant, endpoint_id, {"previous_secret": None})
        return _answer(endpoint_with_secret(row), _SECRET_HEADERS)

    async def test(self, request: Request, endpoint_id: str) -> Response:
        """One sample event, sent now; a receiver that cannot be reached is the caller's to repair."""
        caller = await self._caller(request)
        body = await read_json(request, SampleBody, is_optional=True)
        row = await self._rows.endpoint(caller.tenant, endpoint_id)
        attempt = await self._sender.test(row, body.event_type)
        if attempt.status is None:
            raise InvalidRequestError(f"the sample event was not delivered: {attempt.problem}", param="url")
        return _answer(
            SampleResult(
                object="webhook_endpoint.test",
                webhook_endpoint_id=row.id,
                event_type=body.event_type,
                status_code=attempt.status,
                success=True,
            )
        )

    async def event_types(self, request: Request) -> Response:
        await self._caller(request)
        return _answer(EventTypeList(object="list", data=list(EVENT_TYPES)))

    async def signing_secret(self, request: Request) -> Response:
        caller = await self._caller(request)
        current = (await self._sender.secrets_of_key(caller.key_id))[0]
        return _answer(SigningSecret(object="webhook_secret", signing_secret=current), _SECRET_HEADERS)

    async def deliveries(
        self, request: Request, after: str | None = None, limit: int = 20, order: str = "desc"
    ) -> Response:
        caller = await self._caller(request)
        page = await self._rows.deliveries(caller.tenant, page_request(after, limit, order))
        data = [delivery_object(row) for row in page.items]
        first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
        return _answer(
            DeliveryList(object="list", data=data, first_id=first_id, last_id=last_id, has_more=page.has_more)
        )

    async def resend(self, request: Request, delivery_id: str) -> Response:
        """Makes a delivery due now, with the same event id."""
        caller = await self._caller(request)
        row = await self._rows.resend(caller.tenant, delivery_id)
        self._sender.wake()
        return _answer(delivery_object(row))

    async def _caller(self, request: Request) -> Caller:
        return await self._access.caller(request, "webhooks")


def _answer(body: BaseModel, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(body.model_dump(), headers=headers)


def _add_post(
    router: APIRouter, path: str, endpoint: Any, answer: type[BaseModel], body: type[BaseModel] | None
) -> None:
    """body: shown in OpenAPI only; the route reads it by hand, for errors that name the field."""
    router.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        response_model=answer,
        responses=error_answers(400, 404, 415),
        openapi_extra=None if body is None else request_body(body),
    )
