import math

import numpy as np
from icos_fl_client.forecasting.history import GAP_STEPS_MAX, STEPS_MAX, History


def history_of(*values: float) -> History:
    history = History()
    for value in values:
        history.append(value)
    return history


def test_short_gap_is_bridged_by_the_value_before_it():
    history = history_of(1.0, *[math.nan] * GAP_STEPS_MAX, 3.0)

    assert history.newest(10).tolist() == [1.0, 1.0, 1.0, 1.0, 1.0, 3.0]
    assert history.values_t[1:5].tolist() != history.filled_t[1:5].tolist()


def test_long_gap_begins_a_new_run():
    history = history_of(1.0, 2.0, *[math.nan] * (GAP_STEPS_MAX + 1), 3.0, 4.0)

    assert history.newest(10).tolist() == [3.0, 4.0]
    assert sorted(set(history.starts_t.tolist())) == [0, 7]


def test_nothing_is_newest_where_a_run_is_over():
    assert len(history_of(1.0, *[math.nan] * (GAP_STEPS_MAX + 1)).newest(3)) == 0
    assert len(history_of(math.nan).newest(3)) == 0


def test_infinity_is_no_value():
    assert history_of(1.0, math.inf).filled_t[-1] == 1.0
    assert math.isnan(history_of(1.0, math.inf).values_t[-1])


def test_newest_steps_are_kept_and_older_forgotten():
    history = history_of(*np.arange(2.5 * STEPS_MAX))

    assert len(history.values_t) == STEPS_MAX
    assert history.values_t[-1] == 2.5 * STEPS_MAX - 1
    assert history.count == 2.5 * STEPS_MAX
    assert len(history.newest(3 * STEPS_MAX)) == STEPS_MAX


def test_restored_history_goes_on_as_if_nothing_had_been():
    history, restored = history_of(1.0, math.nan, 2.0), History()
    restored.restore(history.state())
    for each in (history, restored):
        each.append(math.nan)
        each.append(5.0)

    assert all(
        np.array_equal(array, restored.state()[name], equal_nan=True)
        for name, array in history.state().items()
    )
