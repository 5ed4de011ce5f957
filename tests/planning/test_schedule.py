"""Drop schedules against explicit lists of steps."""

import pytest

from layershed.errors import LayershedError, ScheduleError
from layershed.planning.schedule import DropSchedule


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (DropSchedule(1), (1,)),
        (DropSchedule(start=100), (100,)),
        (DropSchedule(100, every_n_steps=50, rounds=3), (100, 150, 200)),
        (DropSchedule(5, every_n_steps=1, rounds=4), (5, 6, 7, 8)),
        (DropSchedule(2, every_n_steps=10, rounds=2), (2, 12)),
    ],
    ids=str,
)
def test_schedule_drops_exactly_at_its_steps(schedule, steps):
    assert schedule.steps == steps
    assert [step for step in range(-5, 300) if schedule.should_drop(step)] == list(steps)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"start": 0}, "start=0"),
        ({"start": -3}, "start=-3"),
        ({"start": 1, "rounds": 0}, "rounds=0"),
        ({"start": 1, "rounds": -1, "every_n_steps": 5}, "rounds=-1"),
        ({"start": 1, "every_n_steps": 0, "rounds": 2}, "every_n_steps=0"),
        ({"start": 1, "every_n_steps": -2, "rounds": 2}, "every_n_steps=-2"),
        ({"start": 1, "rounds": 3}, r"every_n_steps=None, rounds=3.*needs both"),
        ({"start": 1, "every_n_steps": 5}, r"every_n_steps=5, rounds=1.*needs both"),
    ],
    ids=str,
)
def test_invalid_schedule_is_refused(arguments, names):
    with pytest.raises(ScheduleError, match=names):
        DropSchedule(**arguments)


@pytest.mark.parametrize(
    "schedule", [DropSchedule(10), DropSchedule(4, every_n_steps=3, rounds=3)], ids=["one-shot", "iterative"]
)
def test_schedule_without_training_after_its_last_drop_is_refused(schedule):
    schedule.check_against(11)
    schedule.check_against(1000)
    schedule.check_against(-1)
    for max_steps in (10, 9, 1, 0):
        with pytest.raises(ScheduleError, match=rf"step 10 comes too late.*after {max_steps} optimizer"):
            schedule.check_against(max_steps)


def test_equal_schedules_compare_and_hash_equal():
    assert DropSchedule(1) == DropSchedule(1)
    assert len({DropSchedule(1), DropSchedule(1), DropSchedule(2)}) == 2
    assert issubclass(ScheduleError, LayershedError)
    assert issubclass(ScheduleError, ValueError)
