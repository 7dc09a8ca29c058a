import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from icos_fl_local import run_config
from icos_fl_local.errors import UsageError


def complete(overrides: dict[str, run_config.Value], sampling_seconds: float) -> dict[str, object]:
    config = run_config.complete(overrides, ["cpu_usage"], 3, sampling_seconds, "127.0.0.1:1")
    return {key: config[key] for key in ("interval", "horizon")}


def test_values_take_the_type_of_their_default() -> None:
    assert run_config.parse(
        ["learning-rate=1", "strategy=FedProx", "use-wandb=true", "time-step=30", 'server-node="7"']
    ) == {
        "learning-rate": 1.0,
        "strategy": "FedProx",
        "use-wandb": True,
        "time-step": 30,
        "server-node": "7",
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hiden-layer-size=8", "no run-config key 'hiden-layer-size'; nearest: hidden-layer-size"),
        ("time-step", "-c time-step: not of the form key=value"),
        ("time-step=1.5", "-c time-step=1.5: time-step takes a whole number (default 40)"),
        ("time-step=true", "time-step takes a whole number"),
        ("learning-rate=fast", "learning-rate takes a number"),
        ("learning-rate=nan", "learning-rate takes a number"),
        ("use-wandb=on", "use-wandb takes true or false (default false)"),
    ],
)
def test_what_cannot_be_a_setting_is_refused(override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        run_config.parse([override])
    assert message in str(caught.value)


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="seed is given twice"):
        run_config.parse(["seed=1", "seed=2"])


def test_fine_rows_are_averaged_to_fifteen_seconds() -> None:
    assert complete({}, 2.0) == {"interval": 15.0, "horizon": 20}


def test_the_coarsest_node_sets_the_grid_and_the_horizon_covers_five_minutes() -> None:
    assert complete({}, 45.0) == {"interval": 45.0, "horizon": 7}


def test_a_grid_coarser_than_five_minutes_has_a_horizon_of_one_step() -> None:
    assert complete({}, 3600.0) == {"interval": 3600.0, "horizon": 1}


def test_what_the_user_says_goes_before_what_the_data_asks_for() -> None:
    assert complete({"interval": 10.0}, 2.0) == {"interval": 10.0, "horizon": 30}
    assert complete({"horizon": 4}, 2.0) == {"interval": 15.0, "horizon": 4}


def test_a_run_waits_for_all_nodes() -> None:
    config = run_config.complete({}, ["cpu_usage"], 3, 2.0, "127.0.0.1:1")
    assert config["min-available-clients"] == 3


def test_the_three_that_users_know_are_learned_where_they_are() -> None:
    there = ["disk_read_kbps", "cpu_usage", "power_consumption"]
    assert run_config.choose_metrics([], there) == ["power_consumption", "cpu_usage"]


def test_available_memory_stands_in_for_used_memory() -> None:
    there = ["cpu_usage", "memory_available_mib"]
    assert run_config.choose_metrics([], there) == ["cpu_usage", "memory_available_mib"]
    there.append("memory_usage")
    assert run_config.choose_metrics([], there) == ["cpu_usage", "memory_usage"]


def test_an_unknown_metric_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(UsageError, match=r"no node has the metric 'gpu'; there are: a, cpu_usage$"):
        run_config.choose_metrics(["gpu"], ["cpu_usage", "a"])


def test_without_a_known_metric_one_must_be_chosen() -> None:
    with pytest.raises(UsageError, match="choose with --metric from: temperature"):
        run_config.choose_metrics([], ["temperature"])


@given(
    st.dictionaries(
        st.sampled_from(["a", "b-c"]),
        st.text() | st.integers(-(2**62), 2**62) | st.booleans() | st.floats(allow_nan=False),
    )
)
def test_what_is_written_as_toml_is_read_back(config: dict[str, run_config.Value]) -> None:
    assert tomllib.loads(run_config.to_toml(config)) == config
