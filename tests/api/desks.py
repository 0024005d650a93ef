"""Applications over the stores and the service of another one, with keys or with a bucket."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI

from helios_serve.api.auth import Authenticator, OriginPolicy
from helios_serve.api.files import FileService
from helios_serve.api.http_access import HttpAccess, owners_in
from helios_serve.api.http_server import Extras, create_app
from helios_serve.api.keys import Key, KeyRing
from helios_serve.api.media_input import DataUriSource, Media
from helios_serve.api.outgoing import Outgoing
from helios_serve.api.realtime import realtime_route
from helios_serve.api.routes import Desk, Presign, ServerSettings
from helios_serve.api.signed_urls import UrlSigner, signing_keys_from
from helios_serve.api.webhooks import WebhookSender
from tests.api.conftest import FakeDecoder, Parts


def app_over(parts: Parts, keys: Sequence[Key] = (), *, presign: Presign | None = None) -> FastAPI:
    """keys: without any, everybody on this machine may call."""
    service, stores = parts.service, parts.stores
    signing = signing_keys_from("a key of the tests " * 4)
    origins = OriginPolicy(is_keyless=not keys)
    access = HttpAccess(
        Authenticator([KeyRing(keys)] if keys else []),
        origins,
        UrlSigner(signing),
        service.limiter,
        owner_of=owners_in(stores.database),
    )
    media = Media(source=DataUriSource(), decoder=FakeDecoder())
    desk = Desk(
        service=service,
        access=access,
        settings=ServerSettings(version="1.2.3", metrics=parts.metrics),
        media_for=lambda _: media,
        webhooks=WebhookSender(stores.access, Outgoing(), signing, metrics=parts.metrics),
        presign=presign,
    )
    extras = Extras(
        realtime=realtime_route(service, desk.parsed_live, access.socket_caller, desk.links),
        files=FileService(stores.access, stores.blobs, stores.jobs, service.limiter),
        rows=stores.access,
        origins=origins,
    )
    return create_app(desk, extras)
