"""The pause between two questions, measured on a clock that the test moves."""

import pytest
from icos_fl_warm_runtime import pace
from icos_fl_warm_runtime.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        def __init__(self) -> None:
            self.now = 100.0
            self.slept: list[float] = []

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.slept.append(seconds)
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def test_quick_empty_answers_double_the_pause_up_to_the_longest(clock):
    one = Pace(0.1)
    for _ in range(5):
        one.sleep()
    assert clock.slept == pytest.approx([0.02, 0.04, 0.08, 0.1, 0.1])


def test_after_an_answer_that_was_held_there_is_no_pause(clock):
    one = Pace(1.0)
    one.sleep()
    clock.now += pace.HELD_SECONDS
    one.sleep()
    assert clock.slept == pytest.approx([0.02])


def test_after_an_answer_that_was_not_empty_it_begins_anew(clock):
    one = Pace(1.0)
    for _ in range(3):
        one.sleep()
    one.start_again()
    one.sleep()
    assert clock.slept[-1] == pytest.approx(0.02)


def test_no_pause_goes_past_the_deadline(clock):
    one = Pace(10.0)
    one.sleep(until=clock.now + 0.005)
    one.sleep(until=clock.now - 1)
    assert clock.slept == pytest.approx([0.005, 0])
