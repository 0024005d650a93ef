"""Shares of offline work: virtual time per tenant, and the token bucket that pays for bounded ageing.

Knows TFLOP, weights and group-seconds; knows nothing of jobs, deadlines or groups' states.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True, eq=False)
class TenantState:
    """One tenant's account. `vtime` is TFLOP / weight; the sums are TFLOP and only grow."""

    name: str
    weight: float = 1.0
    vtime: float = 0.0
    num_jobs: int = 0
    charged_tflop: float = 0.0
    refunded_tflop: float = 0.0

    def charge(self, tflop: float) -> None:
        """Pay for a chunk that starts."""
        self.charged_tflop += tflop
        self.vtime += tflop / self.weight

    def refund(self, tflop: float) -> None:
        """Take back the part of a chunk that was not run."""
        self.refunded_tflop += tflop
        self.vtime -= tflop / self.weight


class Tenants:
    """All accounts. A tenant that comes back from idle is lifted, so that idling saves up no share."""

    def __init__(self) -> None:
        self._accounts: dict[str, TenantState] = {}
        self._last_left_vtime = 0.0

    def get(self, name: str, weight: float = 1.0) -> TenantState:
        """The account of `name`, made on first use with `weight`."""
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = TenantState(name=name, weight=weight)
        return account

    def busy(self) -> list[TenantState]:
        """Tenants with unfinished offline jobs."""
        return [account for account in self._accounts.values() if account.num_jobs > 0]

    def arriving_vtime(self, name: str) -> float:
        """The virtual time `name` would have with one more job: lifted to the slowest busy tenant if it is idle."""
        account = self.get(name)
        if account.num_jobs > 0:
            return account.vtime
        floor = min((other.vtime for other in self.busy()), default=self._last_left_vtime)
        return max(account.vtime, floor)

    def enter(self, account: TenantState) -> None:
        """One more unfinished offline job of this tenant."""
        account.vtime = self.arriving_vtime(account.name)
        account.num_jobs += 1

    def leave(self, account: TenantState) -> None:
        """One job less; the virtual time of the tenant that left last is kept for the next one to arrive."""
        account.num_jobs -= 1
        if account.num_jobs == 0:
            self._last_left_vtime = account.vtime


@dataclass(slots=True, kw_only=True, eq=False)
class AgeCredit:
    """Token bucket of group-seconds: refilled with `rate` per group and second, holds at most `cap` per group."""

    rate: float = 0.05
    cap: float = 3.0
    balance_s: float = 0.0
    updated_at: float = 0.0

    def refill(self, now: float, num_groups: int) -> float:
        """Add what `num_groups` earned since the last call; returns the balance."""
        elapsed = max(0.0, now - self.updated_at)
        self.balance_s = min(self.cap * num_groups, self.balance_s + self.rate * num_groups * elapsed)
        self.updated_at = now
        return self.balance_s

    def spend(self, seconds: float) -> None:
        """Pay for one aged chunk; the balance may go into debt once, so that long chunks are not shut out."""
        self.balance_s -= seconds
