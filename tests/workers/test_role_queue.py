"""Order, counts and ends of a role's queue; the gate for due work."""

from __future__ import annotations

import threading

from helios_serve.workers.role_queue import DueGate, RoleQueue

WAIT_S = 30


def test_due_work_goes_first_then_in_order_of_arrival() -> None:
    tasks = RoleQueue[int]()
    for number, is_due in enumerate((False, True, False, True)):
        tasks.put(f"{number}", number, is_due=is_due)
    assert tasks.task_ids == ("0", "1", "2", "3")
    assert [tasks.take() for _ in range(4)] == [1, 3, 0, 2]
    assert tasks.task_ids == ("0", "1", "2", "3")
    assert tasks.progress == 4
    for number in range(4):
        tasks.done(f"{number}")
    assert (tasks.task_ids, tasks.progress) == ((), 8)


def test_take_waits_for_work_and_for_the_end() -> None:
    tasks, taken = RoleQueue[str](), list[str | None]()

    def take_all() -> None:
        while (work := tasks.take()) is not None:
            taken.append(work)

    thread = threading.Thread(target=take_all)
    thread.start()
    tasks.put("one", "first")
    while not taken:
        pass
    tasks.close()
    thread.join(WAIT_S)
    assert taken == ["first"]
    tasks.put("two", "late")
    assert tasks.take() is None


def test_the_gate_is_closed_while_due_work_is_left() -> None:
    gate, passed = DueGate(), threading.Event()

    def go() -> None:
        gate.wait()
        passed.set()

    gate.wait()
    gate.add("one")
    gate.add("two")
    thread = threading.Thread(target=go)
    thread.start()
    gate.remove("nobody")
    gate.remove("one")
    assert not passed.wait(0.05)
    gate.remove("two")
    assert passed.wait(WAIT_S)
    thread.join(WAIT_S)
    gate.add("three")
    gate.open()
    gate.wait()
