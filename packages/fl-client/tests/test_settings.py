"""Bad configuration is told with key, value and limit; good one is taken as it is meant."""

import tomllib
from pathlib import Path

import pytest
from icos_fl_client.credentials import Credentials
from icos_fl_client.errors import ConfigError
from icos_fl_client.settings import NodeConfig, RunConfig, parse

NODE = {
    "node-name": "a",
    "processor-address": "127.0.0.1:50051",
    "store-address": "127.0.0.1:16587",
}


def refusal(settings_class, values, what="run config") -> str:
    with pytest.raises(ConfigError) as caught:
        parse(settings_class, values, what)
    return str(caught.value)


def test_a_node_says_who_and_where_it_is():
    node = parse(NodeConfig, NODE | {"threads": 2}, "node config")

    assert (node.node_name, node.processor_address) == ("a", "127.0.0.1:50051")
    assert (node.store.host, node.store.port, node.threads) == ("127.0.0.1", 16587, 2)


def test_a_node_without_a_store_says_so_with_an_empty_address():
    assert parse(NodeConfig, NODE | {"store-address": ""}, "node config").store is None


def test_empty_files_of_the_processor_are_none():
    keys = ("processor-ca", "processor-certificate", "processor-key", "processor-token")
    node = parse(NodeConfig, NODE | dict.fromkeys(keys, ""), "node config")

    assert node.processor_credentials == Credentials()


def test_the_files_of_the_processor_are_its_credentials():
    files = {"processor-ca": "ca.pem", "processor-token": "token"}
    node = parse(NodeConfig, NODE | files, "node config")

    assert node.processor_credentials == Credentials(ca=Path("ca.pem"), token=Path("token"))


def test_every_missing_key_of_a_node_is_named():
    assert refusal(NodeConfig, {}, "node config") == (
        "bad node config: node-name is missing; processor-address is missing; "
        "store-address is missing"
    )


def test_an_unknown_key_of_a_node_is_named_beside_those_that_there_are():
    assert refusal(NodeConfig, NODE | {"thread": 2}, "node config") == (
        "bad node config: thread=2: no such key; there are node-name, processor-address, "
        "processor-ca, processor-certificate, processor-key, processor-token, store-address, "
        "threads"
    )


@pytest.mark.parametrize("value", ["nowhere", "host:", ":1", "host:0", "host:65536", "host:http"])
@pytest.mark.parametrize("key", ["processor-address", "store-address"])
def test_an_address_is_host_and_port(key, value):
    assert refusal(NodeConfig, NODE | {key: value}, "node config") == (
        f"bad node config: {key}={value!r}: must be host:port, with a port from 1 to 65535"
    )


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("node-name", "", "at least 1 character"),
        ("threads", -1, "greater than or equal to 0"),
    ],
)
def test_a_node_says_what_is_out_of_range(key, value, limit):
    message = refusal(NodeConfig, NODE | {key: value}, "node config")

    assert f"{key}={value!r}: " in message
    assert limit in message


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("metric", " , ", "at least 1 item"),
        ("interval", -1, "greater than or equal to 0"),
        ("interval", 86401, "less than or equal to 86400"),
        ("interval", float("nan"), "less than or equal to 86400"),
        ("time-step", 0, "greater than or equal to 1"),
        ("time-step", 1.5, "valid integer"),
        ("horizon", 0, "greater than or equal to 1"),
        ("horizon", 100_001, "less than or equal to 100000"),
        ("train-test-split", 0, "greater than 0"),
        ("train-test-split", 1.01, "less than or equal to 1"),
        ("hidden-layer-size", 0, "greater than or equal to 1"),
        ("num-layers", 65, "less than or equal to 64"),
        ("batch-size", 0, "greater than or equal to 1"),
        ("local-epochs", 0, "greater than or equal to 1"),
        ("learning-rate", 0, "greater than 0"),
        ("learning-rate", float("inf"), "less than or equal to 10"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", "one", "valid integer"),
    ],
)
def test_a_run_says_what_is_out_of_range(key, value, limit):
    message = refusal(RunConfig, {"metric": "cpu_usage"} | {key: value})

    assert message.startswith(f"bad run config: {key}=")
    assert limit in message


def test_the_value_that_is_refused_is_shown():
    assert "horizon=0: " in refusal(RunConfig, {"metric": "cpu_usage", "horizon": 0})


def test_all_bad_keys_are_told_at_once():
    message = refusal(RunConfig, {"horizon": 0, "seed": -1})

    assert message.count(";") == 2
    assert "metric is missing" in message


def test_keys_of_the_server_are_none_of_a_nodes_business():
    parse(RunConfig, {"metric": "cpu_usage", "num-server-rounds": 5}, "run config")


def test_names_are_separated_by_commas_and_count_once():
    run = parse(RunConfig, {"metric": "a, b,a,", "features": ""}, "run config")

    assert (run.metric, run.features) == (("a", "b"), ())


def test_a_metric_is_no_more_input_beside_itself():
    run = parse(RunConfig, {"metric": "a,b", "features": "a,c"}, "run config")

    assert [run.features_of(metric) for metric in run.metric] == [("c",), ("a", "c")]
    assert list(run.query("n", "a").series().features) == ["a", "c"]
    assert list(run.query("n", "b").series().features) == ["b", "a", "c"]


def test_what_is_kept_beside_weights_asks_for_the_same_input_again():
    values = {"metric": "a,b", "features": "c", "time-step": 7, "horizon": 3, "interval": 2.5}
    run = parse(RunConfig, values, "run config")
    again = parse(RunConfig, run.model_config_of("b"), "run config")

    assert again.metric == ("b",)
    assert again.query("n", "b") == run.query("n", "b")


def test_defaults_are_those_of_the_app():
    root = Path(__file__).parents[3]
    app = root / "deploy/local/src/icos_fl_local/flower_app/pyproject.toml"
    if not app.is_file():
        pytest.skip("this package stands alone")
    config = tomllib.loads(app.read_text())["tool"]["flwr"]["app"]["config"]

    assert parse(RunConfig, config, "app") == RunConfig(metric=config["metric"])
