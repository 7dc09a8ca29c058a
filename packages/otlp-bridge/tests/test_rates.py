"""Rates of counters, with values that can be checked by hand, and their one law."""

from hypothesis import given
from hypothesis import strategies as st
from icos_fl_otlp_bridge.rates import GAP_NS_MAX, Counting, Rates

SECOND = 1_000_000_000
T = 1_700_000_000 * SECOND
CUMULATIVE, DELTA = Counting.CUMULATIVE, Counting.DELTA


def rates_of(*points, counting=CUMULATIVE, rates=None):
    """Rates by seconds after T of points (seconds, start in seconds or None, value)."""
    given = [
        (T + round(t * SECOND), 0 if start is None else T + round(start * SECOND), float(value))
        for t, start, value in points
    ]
    found = (rates or Rates()).of("series", counting, given)
    return {(time - T) / SECOND: rate for time, rate in found.items()}


def test_a_cumulative_rate_is_change_over_time():
    assert rates_of((0, -9, 10), (2, -9, 16), (4, -9, 16)) == {2: 3.0, 4: 0.0}


def test_the_first_point_of_a_series_has_no_rate():
    assert rates_of((0, -9, 10)) == {}


def test_the_point_before_may_have_come_in_an_earlier_request():
    rates = Rates()
    rates_of((0, None, 10), rates=rates)
    assert rates_of((2, None, 16), rates=rates) == {2: 3.0}


# Checklist, Data: sums: a reset shows as a changed start time.
def test_a_changed_start_time_is_a_reset_and_counts_from_0():
    assert rates_of((0, -9, 10), (2, 1, 16), (4, 1, 18)) == {2: 8.0, 4: 1.0}


def test_a_counter_that_falls_was_reset_though_nothing_says_so():
    assert rates_of((0, None, 10), (2, None, 6)) == {2: 3.0}


def test_a_counter_that_starts_at_its_own_point_has_an_unknown_beginning():
    assert rates_of((0, -9, 10), (2, 2, 1e12), (4, 2, 1e12 + 6)) == {4: 3.0}


def test_a_start_time_that_jitters_before_the_last_point_is_no_reset():
    assert rates_of((0, -9, 1e12), (2, -8.999, 1e12 + 6)) == {2: 3.0}


def test_an_up_down_counter_may_fall():
    up_and_down = Counting.CUMULATIVE_UP_AND_DOWN
    assert rates_of((0, None, 10), (2, None, 4), counting=up_and_down) == {2: -3.0}


def test_an_up_down_counter_has_no_rate_over_a_reset():
    up_and_down = Counting.CUMULATIVE_UP_AND_DOWN
    assert rates_of((0, -9, 10), (2, 1, 4), (4, 1, 6), counting=up_and_down) == {4: 1.0}


def test_a_delta_is_spread_over_its_own_interval():
    assert rates_of((2, 0, 6), (5, 2, 6), counting=DELTA) == {2: 3.0, 5: 2.0}


def test_a_delta_without_start_is_spread_from_the_point_before():
    assert rates_of((0, None, 6), (2, None, 8), counting=DELTA) == {2: 4.0}


def test_case_6_a_delta_out_of_order_has_the_same_rate():
    rates = Rates()
    assert rates_of((4, 2, 8), counting=DELTA, rates=rates) == {4: 4.0}
    assert rates_of((2, 0, 6), counting=DELTA, rates=rates) == {2: 3.0, 4: 4.0}


def test_case_6_a_series_that_becomes_cumulative_makes_no_spike():
    rates = Rates()
    rates_of((2, 0, 6), (4, 2, 6), counting=DELTA, rates=rates)
    assert rates_of((6, -9, 1e9), (8, -9, 1e9 + 4), rates=rates) == {8: 2.0}


def test_a_late_point_mends_the_rate_of_the_one_after_it():
    rates = Rates()
    assert rates_of((0, None, 0), (4, None, 12), rates=rates) == {4: 3.0}
    assert rates_of((2, None, 2), rates=rates) == {2: 1.0, 4: 5.0}


def test_a_rate_does_not_bridge_a_long_gap():
    gap = GAP_NS_MAX / SECOND
    assert rates_of((0, None, 0), (gap, None, gap)) == {gap: 1.0}
    assert rates_of((0, None, 0), (gap + 1, None, gap)) == {}


def test_of_many_series_those_that_were_silent_longest_are_forgotten():
    rates = Rates(series_max=2)
    for name in ("a", "b", "a", "c"):
        rates.of(name, CUMULATIVE, [(T, 0, 0.0)])
    after = [(T + SECOND, 0, 1.0)]
    assert rates.of("a", CUMULATIVE, after) == {T + SECOND: 1.0}
    assert rates.of("b", CUMULATIVE, after) == {}


def test_what_is_older_than_the_history_has_no_rate_and_spoils_none():
    rates = Rates(history_points=2)
    rates_of((0, None, 0), (2, None, 2), (4, None, 4), rates=rates)
    assert rates_of((-2, None, -9), (0, None, 0), rates=rates) == {}
    assert rates_of((4, None, 4), rates=rates) == {4: 1.0}


@given(
    st.dictionaries(st.integers(0, 100), st.integers(0, 10**6), min_size=1, max_size=20),
    st.randoms(),
    st.sampled_from(Counting),
)
def test_rates_do_not_depend_on_how_the_points_arrive(values, random, counting):
    points = [(T + t * SECOND, 0, float(value)) for t, value in values.items()]
    at_once = Rates().of("s", counting, points)
    random.shuffle(points)
    piecemeal, rates = {}, Rates()
    while points:
        size = random.randint(1, len(points))
        for _ in range(random.randint(1, 2)):  # now and then a batch comes twice
            piecemeal |= rates.of("s", counting, points[:size])
        points = points[size:]
    assert piecemeal == at_once
