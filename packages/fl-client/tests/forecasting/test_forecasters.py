import numpy as np
from icos_fl_client.forecasting import Combination
from icos_fl_client.forecasting.forecasters import Anchors, groups
from icos_fl_client.forecasting.history import STEPS_MAX, History
from icos_fl_client.forecasting.memory import Memory

STEPS = np.array([1, 3])


def history_of(values) -> History:
    history = History()
    for value in values:
        history.append(value)
    return history


def test_anchors_are_those_computed_by_hand():
    # 1, 2, ..., 13: the mean of 10 to 13 is 11.5, the median of 2 to 13 is 7.5, that of all 7.
    history = history_of(range(1, 13))
    history.append(13.0, 13.4)
    forecast_kh = Anchors().forecast(history, STEPS)

    assert forecast_kh.tolist() == [
        [13.0, 13.0],
        [13.4, 13.4],
        [11.5, 11.5],
        [7.5, 7.5],
        [7.0, 7.0],
        [7.0, 7.0],
        [14.0, 16.0],
    ]


def test_a_jump_is_no_drift():
    forecast_kh = Anchors().forecast(history_of([*[1.0] * 20, *[50.0] * 3]), STEPS)

    assert forecast_kh[Anchors.names.index("drift-40")].tolist() == [50.0, 50.0]


def test_anchors_of_a_single_value_all_repeat_it():
    assert {5.0} == set(Anchors().forecast(history_of([5.0]), STEPS).flat)


def test_anchors_have_nothing_to_say_where_a_run_is_over():
    assert np.isnan(Anchors().forecast(history_of([]), STEPS)).all()


def test_memory_finds_what_followed_each_time_before():
    period = [10.0, 10.0, 40.0, 20.0, 30.0, 10.0, 50.0]
    forecast_kh = Memory().forecast(history_of(period * 40), STEPS)

    assert [[period[0], period[2]]] * len(Memory.names) == forecast_kh.round(9).tolist()


def test_memory_by_shape_knows_a_pattern_at_another_level_and_size():
    period = np.array([10.0, 10.0, 40.0, 20.0, 30.0, 10.0, 50.0])
    history = history_of([*np.tile(period, 40), *np.tile(1000 + period / 2, 5)])

    assert Memory().forecast(history, STEPS)[0].round(9).tolist() == [1005.0, 1020.0]


def test_memory_by_shape_makes_what_followed_at_most_twice_as_large():
    period = np.array([10.0, 10.0, 40.0, 20.0, 30.0, 10.0, 50.0])
    history = history_of([*np.tile(period, 40), *np.tile(1000 + 10 * period, 3)])
    by_shape = Memory().forecast(history, STEPS)[0]

    # It is at 1500 and was at 50; 40 and 10 less had followed.
    assert by_shape.round(9).tolist() == [1500.0 - 2 * 40, 1500.0 - 2 * 10]


def test_memory_by_level_tells_levels_apart():
    # At 100 it always goes on to 0, at 200 to 300; seen from the last value both are the same.
    low, high = [*[100.0] * 20, *[0.0] * 20], [*[200.0] * 20, *[300.0] * 20]
    forecast_kh = Memory().forecast(history_of([*low, *high] * 20 + [*low[:20]]), STEPS)

    assert forecast_kh[Memory.names.index("memory-level-nearest-64"), 0] == 0.0


def test_nearest_of_a_likeness_follows_fewer_windows_than_near():
    # Eight steps at a load, then at three times it; now at the highest one.
    loads = np.random.default_rng(0).permutation(np.linspace(10, 90, 60))
    values = [value for load in loads for value in [*[load] * 8, 3 * load]]
    forecast_kh = Memory().forecast(history_of([*values, *[90.0] * 8]), STEPS)
    nearest, near = (Memory.names.index(f"memory-level-{each}-8") for each in ("nearest", "near"))

    assert 250 < forecast_kh[near, 0] < forecast_kh[nearest, 0] <= 270


def test_quantiles_of_what_followed_are_in_order_around_the_forecast():
    values = np.random.default_rng(0).normal(50, 5, size=300)
    forecast_kh, quantile_aqh = Memory().recall(history_of(values), STEPS, (0.1, 0.5, 0.9))

    assert (np.diff(quantile_aqh, axis=1) > 0).all()
    assert forecast_kh[Memory.likenesses :].tolist() == quantile_aqh[:, 1].tolist()


def test_memory_is_silent_before_enough_windows_are_finished():
    # Windows of 8 steps that end at steps 7 to n - 4, since 3 steps must have followed; the 20
    # nearest are looked for among 40.
    near = Memory.names.index("memory-level-near-8")

    assert np.isnan(Memory().forecast(history_of(np.arange(49.0)), STEPS)).all()
    assert np.isfinite(Memory().forecast(history_of(np.arange(50.0)), STEPS)[near]).all()


def test_memory_does_not_look_across_a_gap():
    runs = [[*np.arange(12.0), *[np.nan] * 5] for _ in range(10)]
    flat = [value for run in runs for value in run]

    # Each run of 12 has 2 windows of 8 steps that 3 more follow: 22 of the 40 that are needed.
    assert np.isnan(Memory().forecast(history_of([*flat, *np.arange(12.0)]), STEPS)).all()


def test_what_is_forgotten_changes_nothing():
    values = np.random.default_rng(0).normal(size=9000).cumsum()

    expected = Memory().forecast(history_of(values[-STEPS_MAX:]), STEPS)
    assert expected.tolist() == Memory().forecast(history_of(values), STEPS).tolist()


def test_steps_of_a_group_are_at_most_eight_times_its_first():
    assert groups(np.array([4, 20, 240])) == [slice(0, 2), slice(2, 3)]
    assert groups(np.array([1, 8, 9, 72, 73])) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_a_forecast_of_the_next_minutes_is_the_same_beside_one_of_hours_ahead():
    rng = np.random.default_rng(0)
    values = (np.sin(np.arange(800) / 9) + np.cumsum(rng.normal(0, 0.1, 800))).tolist()
    alone, beside = Combination([4, 20]), Combination([4, 20, 240])
    for value in values:
        near, both = alone.update(value), beside.update(value)
        assert near is not None
        assert both is not None
        assert near.yhat_h.tolist() == both.yhat_h[:2].tolist()
        np.testing.assert_array_equal(near.by_forecaster_kh, both.by_forecaster_kh[:, :2])
