"""Rows to steps, runs, parts and sequences, with numbers computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from icos_fl_processor.errors import StepTooShort
from icos_fl_processor.windows import (
    Normalisation,
    chunks,
    denormalise,
    missing_rows,
    normalise,
    parts,
    resample,
    row_distance_ns,
    sequence_count,
    sliding_windows,
    statistics,
    train_steps,
)

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND
NAN = float("nan")


def times(*seconds: float):
    return START + np.array([round(second * SECOND) for second in seconds], np.int64)


def column(*values: float):
    return np.array(values, np.float64)[:, None]


def seconds(times_ns) -> list[float]:
    return ((times_ns - START) / SECOND).tolist()


# Resampling


def test_rows_at_the_distance_of_steps_keep_their_times_and_values():
    steps = resample(times(0, 15, 30), column(1, 2, 4), 15 * SECOND)
    assert seconds(steps.times_ns_s) == [0, 15, 30]
    assert steps.values_sf.tolist() == [[1], [2], [4]]


def test_interval_zero_takes_the_median_distance_of_rows():
    assert resample(times(0, 10, 20, 30, 95), column(1, 1, 1, 1, 1)).interval_ns == 10 * SECOND


def test_a_step_is_the_mean_of_its_rows():
    steps = resample(times(0, 10, 20, 30), column(1, 3, 5, 9), 20 * SECOND)
    assert seconds(steps.times_ns_s) == [10, 30]
    assert steps.values_sf.tolist() == [[2], [7]]


def test_newest_step_is_whole_with_an_odd_number_of_rows():
    steps = resample(times(0, 10, 20), column(1, 3, 5), 20 * SECOND)
    assert seconds(steps.times_ns_s) == [0, 20]
    assert steps.values_sf.tolist() == [[1], [4]]


def test_rows_that_jitter_stay_in_their_steps():
    steps = resample(times(0, 16, 29, 46, 60), column(1, 2, 3, 4, 5), 15 * SECOND)
    assert steps.values_sf.tolist() == [[1], [2], [3], [4], [5]]
    assert seconds(steps.times_ns_s) == [0, 15, 30, 45, 60]


def test_a_step_without_rows_ends_a_run():
    steps = resample(times(0, 15, 45, 60), column(1, 2, 3, 4), 15 * SECOND)
    assert steps.runs == [range(0, 2), range(2, 4)]
    assert seconds(steps.times_ns_s) == [0, 15, 45, 60]


def test_nan_in_a_needed_column_ends_a_run():
    values = np.array([[1, 1], [2, NAN], [3, 3], [4, 4]])
    steps = resample(times(0, 15, 30, 45), values, 15 * SECOND)
    assert steps.values_sf.tolist() == [[1, 1], [3, 3], [4, 4]]
    assert steps.runs == [range(0, 1), range(1, 3)]


def test_columns_in_different_rows_of_a_step_make_one_step():
    values = np.array([[1, NAN], [NAN, 10], [2, NAN], [NAN, 20]])
    steps = resample(times(0, 1, 15, 16), values, 15 * SECOND)
    assert steps.values_sf.tolist() == [[1, 10], [2, 20]]


def test_a_step_emptied_by_clock_drift_is_interpolated():
    # Rows every 15.6 s on steps of 15 s, 4 % late.
    late = times(*(62.1 - 15.6 * k for k in range(14, -1, -1)))
    steps = resample(late, column(*range(15)), 15 * SECOND)
    # The row k places before the newest lies 15.6 k s before it, step j from 15 j - 7.5 s on. The
    # rows at 187.2 and 202.8 s lie in steps 12 (172.5 on) and 14 (202.5 on): step 13 is empty.
    assert steps.runs == [range(0, 16)]
    # Its middle is at 195 s, half of the way between them, which have the values 2 and 1.
    assert steps.values_sf.ravel().tolist()[:4] == pytest.approx([0, 1, 1.5, 2])


def test_probes_at_15_02_seconds_make_one_run_on_steps_of_15_seconds():
    late = times(*(15.02 * k for k in range(1600)))
    steps = resample(late, column(*range(1600)), 15 * SECOND)
    # 1599 * 15.02 = 24016.98 s hold 1601 steps of 15 s and 1.98 s: 1602 steps with both ends.
    assert len(steps) == 1602
    assert steps.runs == [range(0, 1602)]


def test_rows_exactly_two_steps_apart_are_a_gap():
    steps = resample(times(0, 15, 30, 60), column(1, 2, 3, 4), 15 * SECOND)
    assert steps.runs == [range(0, 3), range(3, 4)]


def test_a_step_shorter_than_the_distance_of_rows_is_refused_with_both():
    with pytest.raises(StepTooShort, match=r"a step of 10 s .* 15 s"):
        resample(times(0, 15, 30), column(1, 2, 3), 10 * SECOND)


def test_distance_of_rows_is_that_of_the_slowest_column():
    values = np.array([[1, 1], [2, NAN], [3, 3], [4, NAN], [5, 5]])
    assert row_distance_ns(times(0, 5, 10, 15, 20), values) == 10 * SECOND


def test_no_rows_make_no_steps():
    steps = resample(times(), np.empty((0, 2)), 15 * SECOND)
    assert (len(steps), steps.runs) == (0, [])


def test_one_row_is_one_step():
    steps = resample(times(5), column(7))
    assert (seconds(steps.times_ns_s), steps.values_sf.tolist()) == ([5], [[7]])


def test_two_outages_of_ten_minutes_make_three_runs():
    minute = [k * 15 for k in range(0, 40)]
    off = 600
    late = [*minute, *(k + 600 + off for k in minute), *(k + 1200 + 2 * off for k in minute)]
    steps = resample(times(*late), column(*late), 15 * SECOND)
    assert steps.runs == [range(0, 40), range(40, 80), range(80, 120)]


# Split and sequences


@pytest.mark.parametrize(("rows", "sequences"), [(7, 0), (8, 1), (9, 2)])
def test_runs_around_the_length_of_a_sequence(rows: int, sequences: int):
    steps = resample(times(*range(0, rows * 15, 15)), column(*range(rows)), 15 * SECOND)
    assert sequence_count(steps.runs, lookback=5, horizon=3) == sequences
    inputs, targets = sliding_windows(steps.values_sf, 5, 3)
    assert (inputs.shape, targets.shape) == ((sequences, 5, 1), (sequences, 3, 1))


def test_split_counts_steps_not_time():
    assert train_steps(10, 0.7) == 7
    assert train_steps(100, 0.29) == 29
    assert train_steps(3, 0.5) == 1


def test_a_run_across_the_split_is_cut_there():
    train, validation = parts([range(0, 4), range(4, 10)], 7)
    assert train == [range(0, 4), range(4, 7)]
    assert validation == [range(7, 10)]


def test_sequences_are_views_of_the_rows():
    rows = np.arange(8.0).reshape(4, 2)
    inputs, targets = sliding_windows(rows, lookback=2, horizon=1)
    assert inputs.tolist() == [[[0, 1], [2, 3]], [[2, 3], [4, 5]]]
    assert targets.tolist() == [[[4, 5]], [[6, 7]]]
    assert np.shares_memory(inputs, rows)
    assert np.shares_memory(targets, rows)


def test_chunks_overlap_by_a_sequence_less_one_step():
    assert list(chunks(range(10, 20), length=3, rows_max=5)) == [
        range(10, 15),
        range(13, 18),
        range(16, 20),
    ]


def test_a_run_that_fills_a_chunk_makes_one_chunk():
    assert list(chunks(range(0, 5), length=3, rows_max=5)) == [range(0, 5)]


def test_a_run_shorter_than_a_sequence_makes_no_chunk():
    assert list(chunks(range(0, 2), length=3, rows_max=5)) == []


# Statistics


def test_statistics_are_of_each_column():
    found = statistics(np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert found.mean_f.tolist() == [2, 5]
    assert found.deviation_f.tolist() == [1, 1]


def test_a_constant_column_with_rounding_has_deviation_one():
    assert statistics(np.full((7, 1), 0.1)).deviation_f.tolist() == [1]


def test_values_are_normalised_to_float32():
    rows = normalise(column(1, 3), Normalisation(np.array([2.0]), np.array([0.5])))
    assert rows.tolist() == [[-2], [2]]
    assert rows.dtype == np.float32


# Missing rows: 15 s a row and step unless said


def missing(rows: int, length: int, fraction: float, capacity: int = 1000, interval: int = 15):
    steps = resample(times(*range(0, rows * 15, 15)), column(*range(rows)), interval * SECOND)
    return missing_rows(steps, length, fraction, capacity)


def test_missing_rows_reach_until_the_training_part_has_a_sequence():
    # 80 of 100 steps are the training part at 0.8.
    assert missing(30, 80, 0.8) == (70, 100)


def test_no_row_is_missing_with_the_last_that_is_needed():
    assert missing(100, 80, 0.8) == (0, 100)
    assert missing(99, 80, 0.8) == (1, 100)


def test_steps_of_two_rows_take_twice_the_rows():
    # 10 rows are 5 steps; 8 are needed, so 3 more steps of 2 rows.
    assert missing(10, 8, 1.0, interval=30) == (6, 16)


def test_without_rows_all_are_missing():
    assert missing(0, 8, 0.5) == (16, 16)


def test_after_a_gap_the_newest_run_must_fill():
    late = [*range(0, 60, 15), *range(600, 660, 15)]
    steps = resample(times(*late), column(*late), 15 * SECOND)
    # Steps 0-3 and 4-7; 6 in a row in the training part are steps 4-9: 10 steps at fraction 1.
    assert missing_rows(steps, 6, 1.0, 1000) == (2, 6)
    # At 0.5 the border stands at step 10 when there are 20.
    assert missing_rows(steps, 6, 0.5, 1000) == (12, 12)


def test_an_old_run_becomes_training_as_the_border_moves():
    late = [*range(0, 150, 15), 600]
    steps = resample(times(*late), column(*late), 15 * SECOND)
    # Of 11 steps 5 are training; the first run has its 6 in the training part when there are 12.
    assert missing_rows(steps, 6, 0.5, 1000) == (1, 12)


def test_a_full_window_loses_what_is_before_the_gap():
    late = [*range(0, 60, 15), *range(600, 660, 15)]
    steps = resample(times(*late), column(*late), 15 * SECOND)
    # 8 of 8 rows. A sequence needs 6 in a row: 2 more, which push 2 old ones out.
    assert missing_rows(steps, 6, 1.0, 8) == (2, 6)


def test_a_window_too_small_for_a_sequence_shows():
    rows, least = missing(8, 6, 0.5, capacity=8)
    assert (rows, least) == (4, 12)


# Laws


def distances_of(*seconds: float):
    """Distances of rows that steps of 15 s can serve."""
    lists = st.lists(st.sampled_from(seconds), max_size=60)
    return lists.filter(lambda found: not found or np.median(found) <= 15.5)


distances = distances_of(15.0, 15.0, 15.3, 14.8, 29.0, 30.0, 75.0)


@given(distances, st.integers(1, 5), st.integers(1, 4), st.floats(0.05, 1))
def test_no_sequence_crosses_a_gap_or_the_split(distances, lookback, horizon, fraction):
    at = times(*np.cumsum([0.0, *distances]))
    steps = resample(at, np.arange(float(len(at)))[:, None], 15 * SECOND)
    border = train_steps(len(steps), fraction)
    for part in parts(steps.runs, border):
        for run in part:
            rows = steps.times_ns_s[run.start : run.stop].astype(np.float64)[:, None]
            inputs, targets = sliding_windows(rows, lookback, horizon)
            whole = np.concatenate([inputs, targets], axis=1)[:, :, 0]
            assert (np.diff(whole, axis=1) == 15 * SECOND).all()
            assert run.stop <= border or run.start >= border


@given(distances, st.floats(0.05, 1))
def test_split_then_join_gives_all_steps(distances, fraction):
    at = times(*np.cumsum([0.0, *distances]))
    steps = resample(at, np.ones((len(at), 1)), 15 * SECOND)
    train, validation = parts(steps.runs, train_steps(len(steps), fraction))
    assert [k for run in (*train, *validation) for k in run] == list(range(len(steps)))


@given(st.integers(0, 60), st.integers(2, 12), st.integers(1, 30))
def test_chunks_hold_every_sequence_once(steps, length, rows_max):
    run = range(100, 100 + steps)
    starts = [
        start
        for chunk in chunks(run, length, rows_max)
        for start in range(chunk.start, chunk.stop - length + 1)
    ]
    assert starts == list(range(100, 100 + steps - length + 1))


@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 20), st.integers(1, 3)),
        elements=st.floats(-1e6, 1e6, width=32),
    )
)
def test_denormalise_undoes_normalise(values):
    by = statistics(values)
    back = denormalise(normalise(values, by), by)
    # float32 keeps 24 bits of the largest normalised value.
    tolerance = np.abs(values - by.mean_f).max(axis=0) * 2**-23 + 1e-9
    assert (np.abs(back - values) <= tolerance).all()


@given(
    distances_of(15.0, 15.0, 15.0, 75.0), st.integers(1, 12), st.floats(0.05, 1), st.integers(0, 40)
)
def test_missing_rows_are_enough_and_needed(distances, length, fraction, spare):
    at = np.cumsum([0.0, *distances])
    steps = resample(times(*at), np.ones((len(at), 1)), 15 * SECOND)
    capacity = len(at) + spare
    missing, least = missing_rows(steps, length, fraction, capacity)
    if least > capacity or missing == 0:
        return

    def sequences(more: int) -> int:
        then = np.concatenate([at, at[-1] + 15.0 * np.arange(1, more + 1)])[-capacity:]
        grown = resample(times(*then), np.ones((len(then), 1)), 15 * SECOND)
        train, _ = parts(grown.runs, train_steps(len(grown), fraction))
        return sequence_count(train, length, 0)

    assert sequences(missing) > 0
    assert sequences(missing - 1) == 0
