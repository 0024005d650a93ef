"""Keys, webhook receivers, their deliveries, uploaded files and tenants' shares. Every verb that a client can reach
names the tenant. Knows rows; sends nothing and checks no limit.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa

from helios_serve.errors import NotFoundError
from helios_serve.store.database import Database, fields_of, insert_into
from helios_serve.store.paging import Page, PageRequest, read_page
from helios_serve.store.records import ApiKey, Delivery, Json, StoredFile, Tenant, WebhookEndpoint
from helios_serve.store.schema import api_key, db_now, delivery, file, meta, tenant, webhook_endpoint

COST_FACTORS = "cost_factors"


class Access:
    """One for each process; every verb is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def add_key(
        self,
        *,
        key_id: str,
        secret: str,
        tenant_id: str,
        name: str = "",
        scopes: Collection[str] = (),
        limits: Json | None = None,
        ttl_s: float | None = None,
        webhook_secret: str | None = None,
    ) -> ApiKey:
        """Stores a key by the SHA-256 of its secret, which is not kept."""
        values = {
            "id": key_id,
            "tenant": tenant_id,
            "name": name,
            "secret_sha256": _sha256(secret),
            "scopes": list(scopes),
            "limits": dict(limits or {}),
            "webhook_secret": webhook_secret,
        }
        return await self._db.write(_add_key, values, ttl_s)

    async def check_key(self, key_id: str, secret: str) -> ApiKey | None:
        """The key, if it exists, the secret is its own, and it has neither expired nor been revoked; in the same time
        whatever of these is wrong."""
        found = await self.key(key_id)
        expected = _sha256("") if found is None else found.secret_sha256
        is_equal = hmac.compare_digest(expected, _sha256(secret))
        return found if is_equal else None

    async def key(self, key_id: str) -> ApiKey | None:
        """The key with this id, unless it has expired or been revoked."""
        return await self._db.read(_valid_key, key_id)

    async def keys(self) -> list[ApiKey]:
        """All keys, revoked and expired ones too, oldest first."""
        return await self._db.read(_keys)

    async def revoke_key(self, key_id: str) -> bool:
        """False when there is no such key."""
        values = {"revoked_at": sa.func.coalesce(api_key.c.revoked_at, db_now())}
        return await self._db.write(_execute_one, sa.update(api_key).where(api_key.c.id == key_id).values(**values))

    async def add_file(self, new: Mapping[str, Any], *, ttl_s: float) -> StoredFile:
        """new: the fields of a `StoredFile` but its times."""
        values = {**new, "created_at": db_now(), "expires_at": db_now() + ttl_s}
        return StoredFile(**(await self._db.write(_insert, file, values)))

    async def file(self, tenant_id: str, file_id: str) -> StoredFile:
        """Raises NotFoundError, also for an expired file."""
        row = await self._db.read(_owned, file, tenant_id, file_id)
        return StoredFile(**row)

    async def files(self, tenant_id: str, page: PageRequest) -> Page[StoredFile]:
        return await self._db.read(_page, file, tenant_id, page, lambda row: StoredFile(**fields_of(file, row)))

    async def delete_file(self, tenant_id: str, file_id: str) -> None:
        """Raises NotFoundError."""
        await self._db.write(_delete_owned, file, tenant_id, file_id)

    async def add_endpoint(
        self,
        *,
        endpoint_id: str,
        tenant_id: str,
        url: str,
        secret: str,
        event_types: Collection[str] = (),
        name: str | None = None,
    ) -> WebhookEndpoint:
        values = {
            "id": endpoint_id,
            "tenant": tenant_id,
            "url": url,
            "secret": secret,
            "event_types": list(event_types),
            "created_at": db_now(),
            "name": name,
        }
        return _endpoint(await self._db.write(_insert, webhook_endpoint, values))

    async def endpoint(self, tenant_id: str, endpoint_id: str) -> WebhookEndpoint:
        """Raises NotFoundError."""
        return _endpoint(await self._db.read(_owned, webhook_endpoint, tenant_id, endpoint_id))

    async def endpoints(self, tenant_id: str, page: PageRequest) -> Page[WebhookEndpoint]:
        return await self._db.read(
            _page, webhook_endpoint, tenant_id, page, lambda row: _endpoint(fields_of(webhook_endpoint, row))
        )

    async def change_endpoint(self, tenant_id: str, endpoint_id: str, changes: Mapping[str, Any]) -> WebhookEndpoint:
        """Sets `url`, `event_types`, `is_disabled`, `name`. Raises NotFoundError."""
        return _endpoint(await self._db.write(_change, webhook_endpoint, tenant_id, endpoint_id, dict(changes)))

    async def rotate_secret(self, tenant_id: str, endpoint_id: str, secret: str) -> WebhookEndpoint:
        """The old secret stays beside the new one, to sign both ways for a while. Raises NotFoundError."""
        changes = {"previous_secret": webhook_endpoint.c.secret, "secret": secret, "rotated_at": db_now()}
        return _endpoint(await self._db.write(_change, webhook_endpoint, tenant_id, endpoint_id, changes))

    async def delete_endpoint(self, tenant_id: str, endpoint_id: str) -> None:
        """Its deliveries go too. Raises NotFoundError."""
        await self._db.write(_delete_owned, webhook_endpoint, tenant_id, endpoint_id)

    async def due_deliveries(self, limit: int, *, hold_s: float) -> list[Delivery]:
        """Pending deliveries whose time has come, hidden from other senders for `hold_s`; attempt counts this one."""
        return await self._db.write(_due, limit, hold_s)

    async def delivered(self, delivery_id: str, status: int) -> None:
        values = {"state": "delivered", "last_status": status}
        await self._db.write(_execute_one, sa.update(delivery).where(delivery.c.id == delivery_id).values(**values))

    async def undelivered(self, delivery_id: str, *, status: int | None, retry_in_s: float | None) -> None:
        """An attempt failed; without another one to come it is a dead letter."""
        values: dict[str, Any] = {"last_status": status, "state": "dead"}
        if retry_in_s is not None:
            values |= {"state": "pending", "next_at": db_now() + retry_in_s}
        await self._db.write(_execute_one, sa.update(delivery).where(delivery.c.id == delivery_id).values(**values))

    async def deliveries(self, tenant_id: str, page: PageRequest) -> Page[Delivery]:
        return await self._db.read(_page, delivery, tenant_id, page, lambda row: Delivery(**fields_of(delivery, row)))

    async def resend(self, tenant_id: str, delivery_id: str) -> Delivery:
        """Makes a delivery due again, with the same event id. Raises NotFoundError."""
        changes = {"state": "pending", "attempt": 0, "next_at": db_now()}
        return Delivery(**(await self._db.write(_change, delivery, tenant_id, delivery_id, changes)))

    async def tenants(self) -> list[Tenant]:
        """Shares and virtual times, for the scheduler's fairness after a restart."""
        return await self._db.read(_tenants)

    async def save_tenants(self, vtimes: Mapping[str, float]) -> None:
        await self._db.write(_save_tenants, dict(vtimes))

    async def set_tenant(self, tenant_id: str, *, weight: float, limits: Json | None = None) -> None:
        await self._db.write(_set_tenant, {"id": tenant_id, "weight": weight, "limits": limits})

    async def save_cost_factors(self, text: str) -> None:
        """What the cost model learned, in its own form."""
        await self._db.write(_save_meta, COST_FACTORS, text)

    async def cost_factors(self) -> str | None:
        query = sa.select(meta.c.value).where(meta.c.key == COST_FACTORS)
        return await self._db.read(_scalar, query)


def _sha256(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _key(row: Mapping[str, Any]) -> ApiKey:
    return ApiKey(**{**row, "scopes": tuple(row["scopes"])})


def _endpoint(row: Mapping[str, Any]) -> WebhookEndpoint:
    return WebhookEndpoint(**{**row, "event_types": tuple(row["event_types"])})


def _add_key(connection: sa.Connection, values: dict[str, Any], ttl_s: float | None) -> ApiKey:
    expires_at = None if ttl_s is None else db_now() + ttl_s
    return _key(_insert(connection, api_key, values | {"created_at": db_now(), "expires_at": expires_at}))


def _valid_key(connection: sa.Connection, key_id: str) -> ApiKey | None:
    is_live = sa.or_(api_key.c.expires_at.is_(None), api_key.c.expires_at > db_now())
    query = sa.select(api_key).where(api_key.c.id == key_id, api_key.c.revoked_at.is_(None), is_live)
    row = connection.execute(query).one_or_none()
    return None if row is None else _key(fields_of(api_key, row))


def _keys(connection: sa.Connection) -> list[ApiKey]:
    return [
        _key(fields_of(api_key, row)) for row in connection.execute(sa.select(api_key).order_by(api_key.c.created_at))
    ]


def _mine(table: sa.Table, tenant_id: str) -> sa.Select[Any]:
    query = sa.select(table).where(table.c.tenant == tenant_id)
    return query.where(table.c.expires_at > db_now()) if table is file else query


def _missing(table: sa.Table, row_id: str) -> NotFoundError:
    code = "file_not_found" if table is file else "route_not_found"
    return NotFoundError(f"{table.name} {row_id[:64]}: not found", param="id", code=code)


def _owned(connection: sa.Connection, table: sa.Table, tenant_id: str, row_id: str) -> dict[str, Any]:
    row = connection.execute(_mine(table, tenant_id).where(table.c.id == row_id)).one_or_none()
    if row is None:
        raise _missing(table, row_id)
    return fields_of(table, row)


def _page(connection: sa.Connection, table: sa.Table, tenant_id: str, page: PageRequest, record: Any) -> Page[Any]:
    return read_page(connection, _mine(table, tenant_id), table, page, record)


def _insert(connection: sa.Connection, table: sa.Table, values: dict[str, Any]) -> dict[str, Any]:
    return fields_of(table, connection.execute(sa.insert(table).values(**values).returning(table)).one())


def _change(
    connection: sa.Connection, table: sa.Table, tenant_id: str, row_id: str, changes: dict[str, Any]
) -> dict[str, Any]:
    mine = sa.update(table).where(table.c.id == row_id, table.c.tenant == tenant_id)
    row = connection.execute(mine.values(**changes).returning(table)).one_or_none()
    if row is None:
        raise _missing(table, row_id)
    return fields_of(table, row)


def _delete_owned(connection: sa.Connection, table: sa.Table, tenant_id: str, row_id: str) -> None:
    mine = sa.delete(table).where(table.c.id == row_id, table.c.tenant == tenant_id)
    if connection.execute(mine).rowcount == 0:
        raise _missing(table, row_id)


def _due(connection: sa.Connection, limit: int, hold_s: float) -> list[Delivery]:
    query = sa.select(delivery.c.id).where(delivery.c.state == "pending", delivery.c.next_at <= db_now())
    due = query.order_by(delivery.c.next_at).limit(limit).with_for_update(skip_locked=True).cte("due")
    rows = connection.execute(
        sa.update(delivery)
        .where(delivery.c.id.in_(sa.select(due.c.id)))
        .values(next_at=db_now() + hold_s, attempt=delivery.c.attempt + 1)
        .returning(delivery)
    )
    return [Delivery(**fields_of(delivery, row)) for row in rows]


def _execute_one(connection: sa.Connection, statement: sa.Update) -> bool:
    return connection.execute(statement).rowcount == 1


def _tenants(connection: sa.Connection) -> list[Tenant]:
    return [Tenant(**fields_of(tenant, row)) for row in connection.execute(sa.select(tenant).order_by(tenant.c.id))]


def _save_tenants(connection: sa.Connection, vtimes: dict[str, float]) -> None:
    for tenant_id, vtime in sorted(vtimes.items()):
        connection.execute(sa.update(tenant).where(tenant.c.id == tenant_id).values(vtime=vtime))


def _set_tenant(connection: sa.Connection, values: dict[str, Any]) -> None:
    changed = {name: value for name, value in values.items() if name != "id"}
    query = insert_into(connection, tenant).values(**values)
    connection.execute(query.on_conflict_do_update(index_elements=["id"], set_=changed))


def _save_meta(connection: sa.Connection, key: str, value: str) -> None:
    query = insert_into(connection, meta).values(key=key, value=value)
    connection.execute(query.on_conflict_do_update(index_elements=["key"], set_={"value": value}))


def _scalar(connection: sa.Connection, query: sa.Select[Any]) -> Any:
    return connection.scalar(query)
