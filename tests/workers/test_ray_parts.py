"""What the Ray executor is made of and what needs no cluster: order of events, payloads, respawns, process identity."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from helios_serve.config import ExecutorConfig
from helios_serve.types import Aborted, ExecutorEvent, StepDone
from helios_serve.workers.payload import num_bytes, pack, unpack
from helios_serve.workers.processes import Process, command, descendants, find_process
from helios_serve.workers.ray_wire import Inbox, Outbox
from helios_serve.workers.respawn import RespawnConfig, RespawnPolicy


def test_respawns_wait_longer_each_time_and_then_stop() -> None:
    policy = RespawnPolicy(RespawnConfig())
    assert [policy.lost(now) for now in (0.0, 10.0, 20.0, 30.0)] == [0.0, 1.0, 4.0, 16.0]
    assert not policy.is_open
    assert policy.lost(40.0) is None
    assert policy.is_open
    assert policy.lost(10_000.0) is None


def test_old_losses_are_forgotten() -> None:
    policy = RespawnPolicy(RespawnConfig(window_s=600.0))
    assert [policy.lost(now) for now in (0.0, 1.0, 2.0, 3.0)][-1] == 16.0
    assert policy.lost(600.0) == 16.0  # the loss at 0 is past the window, three others are not
    assert policy.lost(2_000.0) == 0.0


def test_a_respawn_waits_at_most_the_cap() -> None:
    policy = RespawnPolicy(RespawnConfig(max_losses=10))
    assert [policy.lost(float(now)) for now in range(7)] == [0.0, 1.0, 4.0, 16.0, 60.0, 60.0, 60.0]


def step(name: str) -> StepDone:
    return StepDone(group="dit-0", task_ids=(name,), device_ms=1.0)


def test_batches_are_heard_in_the_order_in_which_they_left() -> None:
    heard: list[ExecutorEvent] = []
    outbox, inbox = Outbox(), Inbox(heard.append)
    outbox.put(step("a"))
    with_beat = outbox.take()
    outbox.put(step("b"))
    with_result = outbox.take(Aborted(task_id="b"))
    inbox.add(with_result)  # overtook the beat
    assert heard == []
    inbox.add(with_beat)
    assert heard == [step("a"), step("b"), Aborted(task_id="b")]
    inbox.add(outbox.take())
    assert len(heard) == 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    name: str
    tensors: tuple[torch.Tensor, ...]


def test_a_payload_holds_tensors_of_any_kind() -> None:
    tensors = (
        torch.arange(6, dtype=torch.float32).view(2, 3).t(),  # not contiguous
        torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        torch.tensor(7),
        torch.zeros(0, 4),
    )
    payload = pickle.loads(pickle.dumps(pack(Parcel(name="x", tensors=tensors))))
    parcel = unpack(payload)
    assert parcel.name == "x"
    for got, sent in zip(parcel.tensors, tensors, strict=True):
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        assert torch.equal(got.nan_to_num(9), sent.nan_to_num(9))
    assert num_bytes(payload) >= sum(tensor.nbytes for tensor in tensors)


def test_a_copied_payload_shares_no_memory() -> None:
    payload = pack(torch.zeros(4))
    shared, own = unpack(payload), unpack(payload, copy=True)
    payload[1][0][:] = 255
    assert shared.isnan().all()
    assert own.eq(0).all()


def test_only_the_very_process_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = find_process(child.pid)
        assert process is not None
        assert process in descendants(os.getpid())
        assert "input()" in command(child.pid)
        assert not Process(pid=child.pid, started=process.started + 1).kill()
        assert child.poll() is None
        assert process.kill()
        assert child.wait(5) == -9
    assert find_process(child.pid) is None
    assert command(child.pid) == ""
    assert not process.kill()


@pytest.mark.parametrize(
    "field",
    [
        {"num_vaes": 0},
        {"num_vae_ranks": 0},
        {"gpus_per_rank": 1.5},
        {"gpus_per_vae": 0.5, "num_vae_ranks": 2},  # two ranks would share a GPU
        {"cpus_per_vae": 0.0},
        {"beat_s": 0.0},
        {"object_store_bytes": 1},
    ],
)
def test_a_cluster_that_cannot_be_is_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        ExecutorConfig(**field)  # type: ignore[arg-type]


def test_a_ray_client_address_is_refused() -> None:
    with pytest.raises(ValueError, match="ray://"):
        ExecutorConfig(address="ray://head:10001")


def test_cores_of_all_workers() -> None:
    config = ExecutorConfig(num_dit_groups=2, num_dit_ranks=2, num_vaes=2, cpus_per_encoder=0.5, cpus_per_vae=2)
    assert config.num_cpus == 9
    assert replace(config, num_vae_ranks=3).num_cpus == 17
