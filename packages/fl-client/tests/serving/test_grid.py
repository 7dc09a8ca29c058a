"""Rows to the steps of a grid."""

import numpy as np
import pytest
from icos_fl_client.serving.grid import Grid, Step

SECOND = 10**9
START = 1_700_000_000 * SECOND


def times(*seconds: float) -> np.ndarray:
    return START + (np.array(seconds) * SECOND).astype(np.int64)


def steps(grid: Grid, seconds: list[float], values: list[float]) -> list[Step]:
    return list(grid.add(times(*seconds), np.array(values, float)))


def regular(distance: float, count: int) -> list[float]:
    return [place * distance for place in range(count)]


def test_a_step_is_the_mean_of_its_rows_and_tells_the_newest_one():
    found = steps(Grid(15 * SECOND), regular(3, 10), list(range(10)))
    assert found == [(0, 2.0, 4.0), (1, 7.0, 9.0)]


def test_the_newest_row_that_a_step_is_due_makes_it_whole():
    grid = Grid(15 * SECOND)
    steps(grid, regular(3, 10), [1.0] * 10)
    assert [steps(grid, [second], [1.0]) for second in (30, 33, 36, 39)] == [[], [], [], []]
    assert steps(grid, [42], [1.0]) == [(2, 1.0, 1.0)]


def test_no_row_before_the_due_time_makes_a_step_whole():
    grid = Grid(15 * SECOND)
    assert grid.due_ns is None
    steps(grid, regular(3, 10), [1.0] * 10)
    due = (grid.due_ns - START) / SECOND
    assert due == 43.5 - 3
    assert steps(grid, [30, due - 1e-6], [1.0] * 2) == []
    assert steps(grid, [due], [1.0]) == [(2, 1.0, 1.0)]


def test_a_step_ends_half_a_row_distance_after_its_newest_row():
    grid = Grid(15 * SECOND)
    found = steps(grid, regular(3, 10), [1.0] * 10)
    assert grid.end_ns(found[-1][0]) == START + 27 * SECOND + 3 * SECOND // 2


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 24])
def test_rows_that_come_apart_make_the_same_steps_as_rows_that_come_together(cut):
    rng = np.random.default_rng(0)
    seconds, values = regular(3, 50), rng.normal(size=50).tolist()
    whole = Grid(15 * SECOND)
    expected = steps(whole, seconds[:25], values[:25]) + steps(whole, seconds[25:], values[25:])
    grid = Grid(15 * SECOND)
    found = steps(grid, seconds[:25], values[:25])
    for first in range(25, 50, cut):
        found += steps(grid, seconds[first : first + cut], values[first : first + cut])
    assert [step for step, *_ in expected] == [step for step, *_ in found]
    np.testing.assert_allclose(expected, found)


def test_rows_that_jitter_by_less_than_half_their_distance_leave_no_step_empty():
    rng = np.random.default_rng(1)
    seconds = (np.arange(400) * 15 + rng.uniform(-7, 7, 400)).tolist()
    grid = Grid(15 * SECOND)
    found = steps(grid, [0, 15, 30], [0.0] * 3)
    for second in seconds[3:]:
        found += steps(grid, [second], [1.0])
    taken = [step for step, *_ in found]
    assert taken == list(range(taken[0], taken[0] + len(taken)))


def test_a_step_without_a_value_is_left_out():
    values = [1.0, 1, np.nan, np.nan, 1, 1]
    assert [step for step, *_ in steps(Grid(15 * SECOND), regular(15, 6), values)] == [0, 1, 4, 5]


def test_values_that_come_twice_or_late_are_taken_once():
    grid = Grid(15 * SECOND)
    steps(grid, regular(3, 10), [1.0] * 10)
    assert steps(grid, [21, 24, 27], [100.0] * 3) == []
    assert steps(grid, [30, 33, 36, 39, 42], [1.0] * 5) == [(2, 1.0, 1.0)]


def test_one_row_alone_makes_no_step_and_is_not_lost():
    grid = Grid(15 * SECOND)
    assert steps(grid, [0], [4.0]) == []
    assert steps(grid, [15], [6.0]) == [(0, 4.0, 4.0), (1, 6.0, 6.0)]


def test_rows_further_apart_than_a_step_are_told():
    grid = Grid(15 * SECOND)
    steps(grid, regular(15.5, 10), [1.0] * 10)
    assert not grid.is_too_fine
    steps(grid, [200 + second for second in regular(16, 40)], [1.0] * 40)
    assert grid.is_too_fine


def test_a_restored_grid_goes_on_within_the_step():
    grid = Grid(15 * SECOND)
    steps(grid, regular(3, 12), [1.0] * 12)
    restored = Grid(15 * SECOND)
    restored.restore(grid.state())
    seconds, values = regular(3, 24)[12:], [7.0] * 12
    assert steps(restored, seconds, values) == steps(grid, seconds, values) != []
