"""Beats, windows and progress."""

from __future__ import annotations

from helios_serve.engine.liveness import Liveness, LivenessConfig

CFG = LivenessConfig()


def patient(_: str) -> float:
    return 5.0


def ticking(liveness: Liveness, start: float, seconds: float) -> list[tuple[float, str, str]]:
    """Verdicts of ticks every quarter of a second, with their times."""
    found = []
    for step in range(1, round(4 * seconds) + 1):
        now = start + 0.25 * step
        found += [(now, group, why) for group, why in liveness.tick(now, 0.25, patient)]
    return found


def test_a_group_that_beats_is_left_alone() -> None:
    liveness = Liveness(CFG)
    liveness.up("dit-0", 0.0)
    for step in range(100):
        now = 0.25 * step
        liveness.beat("dit-0", 0, False, now)
        assert liveness.tick(now, 0.25, patient) == []


def test_four_missed_beats_are_silence() -> None:
    liveness = Liveness(CFG)
    liveness.up("dit-0", 0.0)
    liveness.beat("dit-0", 0, False, 1.0)
    liveness.tick(1.0, 0.25, patient)
    (at, group, why), *_ = ticking(liveness, 1.0, 4.0)
    assert (at, group) == (3.25, "dit-0")
    assert "silent" in why


def test_a_busy_group_without_progress_is_stuck_and_an_idle_one_is_not() -> None:
    liveness = Liveness(CFG)
    for name in ("busy", "idle", "moving"):
        liveness.up(name, 0.0)
    for step in range(40):
        now = 0.25 * step
        liveness.beat("busy", 7, True, now)
        liveness.beat("idle", 7, False, now)
        liveness.beat("moving", step // 8, True, now)
        verdicts = liveness.tick(now, 0.25, patient)
        assert [group for group, _ in verdicts] == (["busy"] if now > 5.0 else [])
    assert liveness.progress_age_s("busy", 9.75) == 9.75
    assert liveness.progress_age_s("idle", 9.75) == 0.0


def test_work_that_begins_late_has_its_whole_window() -> None:
    liveness = Liveness(CFG)
    liveness.up("dit-0", 0.0)
    for step in range(400):
        now = 0.25 * step
        liveness.beat("dit-0", 3, now >= 50.0, now)
        verdicts = liveness.tick(now, 0.25, patient)
        assert bool(verdicts) == (now > 55.0)
        if verdicts:
            return


def test_a_late_loop_restarts_all_windows() -> None:
    liveness = Liveness(CFG)
    liveness.up("dit-0", 0.0)
    liveness.tick(0.25, 0.25, patient)
    assert liveness.tick(10.0, 0.25, patient) == []
    assert ticking(liveness, 10.0, 2.0) == []
    assert ticking(liveness, 12.0, 0.25) != []


def test_a_group_that_is_down_is_not_judged() -> None:
    liveness = Liveness(CFG)
    liveness.up("dit-0", 0.0)
    liveness.down("dit-0")
    liveness.beat("dit-0", 1, True, 0.1)
    assert ticking(liveness, 0.0, 10.0) == []
