"""Laws of the rows of a window, against a dictionary that does the same slowly."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from icos_fl_timeseries_store.buffer import RowBuffer

batches = st.lists(
    st.tuples(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True),
        st.lists(st.integers(1, 30), max_size=8),
    ),
    max_size=12,
)


@given(st.integers(1, 12), batches)
def test_append_then_read_is_a_dictionary_by_time(capacity, batches):
    buffer = RowBuffer(capacity)
    expected: dict[int, dict[str, float]] = {}
    value = 0.0
    for columns, times in batches:
        oldest = min(expected, default=0) if len(expected) >= capacity else 0
        rows = []
        for time in times:
            value += 1
            rows.append([value] * len(columns))
            if time >= oldest:
                expected.setdefault(time, {}).update(dict.fromkeys(columns, value))
        buffer.append(columns, np.array(times, np.int64), np.array(rows).reshape(-1, len(columns)))
        expected = dict(sorted(expected.items())[-capacity:])

    rows = buffer.read()
    seen = {
        time: {
            column: number
            for column, number in zip(rows.columns, values, strict=True)
            if number == number
        }
        for time, values in zip(rows.times_ns_t.tolist(), rows.values_tf.tolist(), strict=True)
    }
    assert seen == expected


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_reading_by_cursor_again_and_again_misses_no_time(times):
    buffer = RowBuffer(1000)
    seen: set[int] = set()
    cursor = 0
    for time in times:
        buffer.append(["x"], np.array([time]), np.ones((1, 1)))
        rows = buffer.read(after=cursor)
        cursor = rows.cursor
        seen |= set(rows.times_ns_t.tolist())
    assert seen == set(times)


def test_a_restored_window_is_the_one_that_was_kept():
    buffer = RowBuffer(5)
    buffer.append(["x"], np.arange(1, 11), np.ones((10, 1)), {"x": "W"})
    again = RowBuffer.restored(buffer.snapshot())
    assert again.read().times_ns_t.tolist() == [6, 7, 8, 9, 10]
    assert again.read().units == ("W",)
    again.append(["y"], np.array([11]), np.ones((1, 1)))
    assert again.read(after=buffer.cursor).times_ns_t.tolist() == [11]
    assert len(again) == 5


def test_a_small_window_does_not_take_the_room_of_a_large_one():
    buffer = RowBuffer(1_000_000)
    buffer.append(["x"], np.array([1]), np.ones((1, 1)))
    assert buffer._times.nbytes < 10_000


def test_sliding_for_long_keeps_memory_flat():
    buffer = RowBuffer(300)
    for start in range(1, 60_000, 60):
        buffer.append(["x"], np.arange(start, start + 60), np.ones((60, 1)))
    assert len(buffer) == 300
    assert len(buffer._times) <= 1_500
