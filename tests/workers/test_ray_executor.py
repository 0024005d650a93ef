"""The Ray executor on a real local cluster with tiny checkpoints: results, deaths, freezes and what is left behind.

Driven by hand, without an engine: each test says what is submitted and whom it kills.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helios_serve.config import ExecutorConfig, ModelConfig
from helios_serve.faults import Fault, FaultPlan
from helios_serve.model_executor.model import load_model
from helios_serve.types import Aborted, Beat, GroupLost, GroupUp, Parked, StepDone, TaskDone, TaskFailed, TensorRef

ray = pytest.importorskip("ray")

from helios_serve.workers.ray_executor import RayExecutor  # noqa: E402
from tests.workers.ray_driver import (  # noqa: E402
    Driver,
    Local,
    chunk_task,
    decode_task,
    encode_task,
    make_request,
    patience,
    run_locally,
    wait_until_gone,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

SLEEP_S = 1.5

FAULTS = FaultPlan(
    Fault(point="dit.step", action="sleep", where={"request_id": "slow", "step": 1}, times=1000, seconds=SLEEP_S),
    Fault(point="vae.decode", action="sleep", where={"request_id": "slow"}, times=1000, seconds=SLEEP_S),
    Fault(point="text.encode", action="sleep", where={"request_id": "slow"}, times=1000, seconds=SLEEP_S),
    Fault(point="text.encode", action="kill", where={"prompt": "poison"}, times=1000),
    Fault(point="text.encode", action="raise", where={"prompt": "raise"}, times=1000),
    Fault(point="dit.step", action="nan", where={"request_id": "nan"}, times=1000),
)


def owned_objects() -> set[str]:
    """Ray objects that somebody still refers to."""
    return {key.decode() for key in ray._private.worker.global_worker.core_worker.get_all_reference_counts()}


@pytest.fixture(scope="module")
def local(tiny_distilled: Path) -> Local:
    """What the request "slow" must give, and every other with its prompt."""
    return run_locally(load_model(ModelConfig(model=str(tiny_distilled))), make_request("local"))


@pytest.fixture(scope="class")
def driver(request: pytest.FixtureRequest, tiny_distilled: Path) -> Iterator[Driver]:
    """An executor with the groups that the test class asks for, all up."""
    config = ExecutorConfig(
        num_dit_groups=request.cls.num_groups,
        num_dit_ranks=request.cls.num_ranks,
        cpus_per_vae=1,
        object_store_bytes=256 << 20,
    )
    model = ModelConfig(model=str(tiny_distilled))
    made = Driver(RayExecutor(model, config, FAULTS, exit_process=lambda _: None))
    waiting = {"encoder-0", "vae-0", *(f"dit-{i}" for i in range(config.num_dit_groups))}
    while waiting:
        waiting.discard(made.hear(GroupUp).group)
    yield made
    made.executor.close(20)


@pytest.mark.xdist_group("ray")
class TestTwoGroups:
    """One encoder, two DiT groups of one rank, one VAE worker."""

    num_groups, num_ranks = 2, 1

    def test_groups_agree_on_the_golden_chunk(self, driver: Driver) -> None:
        ups = [heard.event for heard in driver.history if isinstance(heard.event, GroupUp)]
        goldens = [up.golden for up in ups if up.role == "dit"]
        assert len(goldens) == 2
        assert goldens[0] is not None
        assert len(set(goldens)) == 1
        assert {up.incarnation for up in ups} == {0}

    def test_a_video_equals_that_of_a_local_run(self, driver: Driver, local: Local) -> None:
        video = make_request("fox")
        encoded = driver.encode(video)
        assert [phase.name for phase in encoded.phases] == ["text_encode"]
        trail: list[TaskDone] = []
        mark = len(driver.history)
        for chunk in range(3):  # the groups take turns: a chunk runs anywhere
            trail.append(driver.finish(f"dit-{chunk % 2}", chunk_task(encoded, chunk, tuple(trail))))
        steps = [h.event for h in driver.history[mark:] if isinstance(h.event, StepDone | TaskDone)]
        assert [type(event).__name__ for event in steps] == ["StepDone", "StepDone", "StepDone", "TaskDone"] * 3
        decoded = [driver.decode(video, chunk, done.latents) for chunk, done in enumerate(trail)]
        assert [one.latents_digest for one in decoded] == local.digests
        assert [one.segment.media for one in decoded] == [segment.media for segment in local.segments]
        assert decoded[0].segment.init == local.segments[0].init

    def test_dropped_objects_are_freed(self, driver: Driver) -> None:
        video = make_request("drop")
        driver.executor.drop([TensorRef(key=key) for key in list(driver.executor._objects)])
        encoded = driver.encode(video)
        done = driver.finish("dit-0", chunk_task(encoded))
        assert driver.executor.num_objects == 2
        held = {driver.executor._objects[ref.key].hex() for ref in (encoded.conditioning, done.latents)}
        assert held <= owned_objects()
        driver.executor.drop([encoded.conditioning, done.latents])
        deadline = time.monotonic() + 10
        while held & owned_objects():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert driver.executor.num_objects == 0

    def test_a_task_whose_input_was_dropped_fails(self, driver: Driver) -> None:
        task = decode_task(make_request("gone"), 0, TensorRef(key="gone"))
        driver.executor.submit("vae-0", [task])
        failed = driver.hear(TaskFailed)
        assert (failed.task_id, failed.fault) == (task.task_id, "error")

    def test_a_failed_request_leaves_its_worker_alive(self, driver: Driver) -> None:
        driver.executor.submit("encoder-0", [encode_task(make_request("raise", prompt="raise"))])
        assert driver.hear(TaskFailed).fault == "error"
        driver.executor.submit("dit-0", [chunk_task(driver.encode(make_request("nan")))])
        assert driver.hear(TaskFailed).fault == "nan"
        assert not any(isinstance(event, GroupLost) for event in driver.hear_for(0.2))

    def test_a_parked_chunk_goes_on_elsewhere(self, driver: Driver, local: Local) -> None:
        video = make_request("slow")
        encoded = driver.encode(video)
        task = chunk_task(encoded)
        driver.executor.submit("dit-0", [task])
        driver.wait_until_busy("dit-0", task.task_id)
        driver.executor.signal("dit-0", task.task_id, "park")
        parked = driver.hear(Parked)
        done = driver.finish("dit-1", chunk_task(encoded, parked=parked.state))
        assert driver.decode(video, 0, done.latents).latents_digest == local.digests[0]

    def test_an_aborted_chunk_is_answered(self, driver: Driver) -> None:
        task = chunk_task(driver.encode(make_request("slow")))
        driver.executor.submit("dit-0", [task])
        driver.executor.signal("dit-0", task.task_id, "abort")
        assert driver.hear(Aborted).task_id == task.task_id

    def test_a_killed_dit_group(self, driver: Driver, local: Local) -> None:
        """Its earlier results stay readable; its chunk gives the same on the other group; it comes back."""
        video = make_request("slow")
        encoded = driver.encode(video)
        first = driver.finish("dit-0", chunk_task(encoded))
        task = chunk_task(encoded, 1, (first,))
        driver.executor.submit("dit-0", [task])
        driver.wait_until_busy("dit-0", task.task_id)
        killed_at = time.monotonic()
        driver.kill("dit-0")
        lost = driver.lost("dit-0")
        assert driver.heard_at(lost) - killed_at < patience(0.5)
        again = driver.finish("dit-1", chunk_task(encoded, 1, (first,)))
        assert driver.decode(video, 0, first.latents).latents_digest == local.digests[0]
        assert driver.decode(video, 1, again.latents).latents_digest == local.digests[1]
        back = driver.back(lost)
        assert back.golden == driver.golden
        driver.report("kill -9 of a DiT actor", killed_at, lost, again, back)
        assert not driver.has_answer(task.task_id)

    def test_a_killed_vae_worker(self, driver: Driver, local: Local) -> None:
        video = make_request("slow")
        latents = driver.finish("dit-1", chunk_task(driver.encode(video))).latents
        task = decode_task(video, 0, latents)
        driver.executor.submit("vae-0", [task])
        driver.wait_until_busy("vae-0", task.task_id)
        killed_at = time.monotonic()
        driver.kill("vae-0")
        lost = driver.lost("vae-0")
        assert driver.heard_at(lost) - killed_at < patience(0.5)
        back = driver.back(lost)
        assert driver.decode(video, 0, latents).segment.media == local.segments[0].media
        driver.report("kill -9 of a VAE actor", killed_at, lost, back)

    def test_an_encoder_that_crashes(self, driver: Driver, local: Local) -> None:
        video = make_request("slow")
        task = encode_task(video)
        driver.executor.submit("encoder-0", [task])
        driver.wait_until_busy("encoder-0", task.task_id)
        killed_at = time.monotonic()
        driver.kill("encoder-0", kind=signal.SIGSEGV)
        lost = driver.lost("encoder-0")
        assert driver.heard_at(lost) - killed_at < patience(0.5)
        back = driver.back(lost)
        done = driver.finish("dit-1", chunk_task(driver.encode(video)))
        assert driver.decode(video, 0, done.latents).latents_digest == local.digests[0]
        driver.report("SIGSEGV of the encoder", killed_at, lost, back)

    def test_a_request_that_kills_its_worker(self, driver: Driver) -> None:
        driver.executor.submit("encoder-0", [encode_task(make_request("poison", prompt="poison"))])
        lost = driver.lost("encoder-0")
        driver.back(lost)
        driver.encode(make_request("after"))

    def test_a_frozen_dit_group(self, driver: Driver, local: Local) -> None:
        """No beat comes; condemned, it is killed at once, and nothing is heard of its work."""
        video = make_request("slow")
        encoded = driver.encode(video)
        task = chunk_task(encoded)
        driver.executor.submit("dit-1", [task])
        driver.wait_until_busy("dit-1", task.task_id)
        pid = driver.kill("dit-1", kind=signal.SIGSTOP)
        driver.hear_for(0.2)  # a beat may have been on its way
        events = driver.hear_for(1.5)
        assert {event.group for event in events if isinstance(event, Beat)} == {"encoder-0", "dit-0", "vae-0"}
        assert not any(isinstance(event, GroupLost) for event in events)
        condemned_at = time.monotonic()
        driver.executor.condemn("dit-1", "silent")
        lost = driver.lost("dit-1")
        assert lost.why == "silent"
        assert driver.heard_at(lost) - condemned_at < patience(0.5)
        gone_s = wait_until_gone(pid, patience(1.5))
        again = driver.finish("dit-0", chunk_task(encoded))
        assert driver.decode(video, 0, again.latents).latents_digest == local.digests[0]
        back = driver.back(lost)
        driver.report("condemned after SIGSTOP", condemned_at, lost, again, back)
        print(f"[condemned after SIGSTOP] process gone after {gone_s:.3f} s")
        assert not driver.has_answer(task.task_id)

    def test_a_late_result_is_dropped(self, driver: Driver) -> None:
        task = chunk_task(driver.encode(make_request("slow")))
        driver.executor.submit("dit-1", [task])
        driver.wait_until_busy("dit-1", task.task_id)
        driver.executor.condemn("dit-1", "slow")
        driver.executor.condemn("dit-1", "said twice")
        assert driver.lost("dit-1").why == "slow"
        events = driver.hear_for(SLEEP_S + 0.5)
        assert not any(isinstance(event, GroupLost) for event in events)
        assert not driver.has_answer(task.task_id)


@pytest.mark.xdist_group("ray")
class TestTwoRanks:
    """One DiT group of two ranks that meet over gloo."""

    num_groups, num_ranks = 1, 2

    def test_one_dead_rank_is_the_end_of_its_group(self, driver: Driver) -> None:
        video = make_request("slow")
        encoded = driver.encode(video)
        calm = driver.finish("dit-0", chunk_task(encoded))
        expected = driver.decode(video, 0, calm.latents).latents_digest
        task = chunk_task(encoded)
        driver.executor.submit("dit-0", [task])
        driver.wait_until_busy("dit-0", task.task_id)
        survivor = driver.executor.processes("dit-0")[0].pid
        killed_at = time.monotonic()
        driver.kill("dit-0", rank=1)
        lost = driver.lost("dit-0")
        assert driver.heard_at(lost) - killed_at < patience(0.5)
        wait_until_gone(survivor, patience(1.5))
        back = driver.back(lost)
        assert (back.num_ranks, back.golden) == (2, driver.golden)
        again = driver.finish("dit-0", chunk_task(encoded))
        assert driver.decode(video, 0, again.latents).latents_digest == expected  # of two ranks; one rounds otherwise
        driver.report("kill -9 of rank 1 of 2", killed_at, lost, back, again)
        assert not driver.has_answer(task.task_id)

    def test_a_silent_rank_silences_its_group(self, driver: Driver) -> None:
        driver.kill("dit-0", rank=1, kind=signal.SIGSTOP)
        driver.hear_for(0.2)
        assert not any(isinstance(e, Beat) and e.group == "dit-0" for e in driver.hear_for(1.2))
        driver.kill("dit-0", rank=1, kind=signal.SIGCONT)
        driver.hear(Beat, lambda event: event.group == "dit-0")

    def test_nothing_is_left_after_close(self, driver: Driver) -> None:
        before = driver.pids()
        frozen = driver.kill("dit-0", rank=1, kind=signal.SIGSTOP)
        assert frozen in before
        started = time.monotonic()
        driver.executor.close(20)
        print(f"[close] {time.monotonic() - started:.3f} s, {len(before)} processes")
        for pid in before:
            wait_until_gone(pid, 5.0)
        assert driver.executor.num_objects == 0
        driver.executor.submit("dit-0", [])  # nobody is left to mind


CONTROL_LOSS = """
import os, sys, time
from helios_serve.config import ExecutorConfig, ModelConfig
from helios_serve.types import GroupLost, GroupUp
from helios_serve.workers.ray_executor import RayExecutor
from helios_serve.workers.processes import command, descendants
from tests.workers.ray_driver import Driver

config = ExecutorConfig(cpus_per_vae=1, object_store_bytes=256 << 20)
driver = Driver(RayExecutor(ModelConfig(model=sys.argv[1]), config))
for _ in range(3):
    driver.hear(GroupUp)
[gcs] = [process for process in descendants(os.getpid()) if "gcs/gcs_server" in command(process.pid)]
print("below", *(process.pid for process in descendants(os.getpid())))
started = time.monotonic()
gcs.kill()
lost = {driver.hear(GroupLost).group for _ in range(3)}
print("lost", *sorted(lost), f"{time.monotonic() - started:.1f}", flush=True)
time.sleep(60)
"""


def test_without_its_control_service_the_process_asks_for_a_new_start(tiny_distilled: Path) -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", CONTROL_LOSS, str(tiny_distilled)], stdout=subprocess.PIPE, text=True, cwd=root
    ) as child:
        assert child.stdout is not None
        pids = [int(word) for word in next(line for line in child.stdout if line.startswith("below")).split()[1:]]
        words = next(line for line in child.stdout if line.startswith("lost")).split()
        told_at = time.monotonic()
        assert words[1:4] == ["dit-0", "encoder-0", "vae-0"]
        assert float(words[4]) < 10 + patience(1)
        assert child.wait(50) == 75
        for pid in pids:
            wait_until_gone(pid, 5.0)
        print(f"[kill -9 of the GCS] GroupLost {words[4]} s, exit {time.monotonic() - told_at:.1f} s later")
