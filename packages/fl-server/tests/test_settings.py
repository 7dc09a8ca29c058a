"""The server's keys of the run configuration: defaults, ranges, and what is said of bad values."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from icos_fl_server.errors import ServerError
from icos_fl_server.settings import RunConfig, parse

APP = Path(__file__).parents[3] / "deploy/local/src/icos_fl_local/flower_app/pyproject.toml"


def test_defaults_are_those_of_the_flower_app():
    declared = tomllib.loads(APP.read_text())["tool"]["flwr"]["app"]["config"]
    given = parse({"metric": declared["metric"]}).model_dump(by_alias=True)
    given["metric"] = ",".join(given["metric"])
    given["result-dir"] = str(given["result-dir"])
    assert given == {key: declared[key] for key in given}


def test_keys_of_the_nodes_are_left_to_them():
    assert parse({"metric": "cpu_usage", "hidden-layer-size": "?"}).metric == ("cpu_usage",)


def test_every_bad_key_is_named_with_its_value_and_limit():
    with pytest.raises(ServerError) as caught:
        parse({"metric": "cpu", "num-server-rounds": 0, "fraction-fit": 1.5})
    assert "num-server-rounds=0: Input should be greater than or equal to 1" in str(caught.value)
    assert "fraction-fit=1.5: Input should be less than or equal to 1" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("strategy", "FedBest", "no such strategy; there are FedAvg, FedProx"),
        ("metric", " , ", "names no column"),
        ("metric", "../../etc", "'../../etc' is no column"),
        ("metric", "cpu,cpu", "'cpu' is there twice"),
        ("store-address", "localhost", "not of the form host:port"),
        ("store-address", "localhost:99999", "not of the form host:port"),
        ("node-timeout", float("inf"), "finite number"),
        ("proximal-mu", -0.1, "greater than or equal to 0"),
        ("min-fit-clients", 0, "greater than or equal to 1"),
        ("fraction-evaluate", -0.5, "greater than or equal to 0"),
    ],
)
def test_a_value_out_of_range_is_refused(key, value, said):
    with pytest.raises(ServerError) as caught:
        parse({"metric": "cpu_usage", key: value})
    assert f"{key}={value!r}" in str(caught.value)
    assert said in str(caught.value)


def test_the_store_is_where_its_address_says():
    store = parse({"metric": "cpu", "store-address": "store.lan:16587"}).store
    assert store is not None
    assert (store.host, store.port) == ("store.lan", 16587)


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig.model_validate({"metric": "cpu"}).strategy = "Krum"


@pytest.mark.parametrize(
    ("config", "status", "said"),
    [
        ('metric = "cpu_usage"', 0, ""),
        ('metric = "cpu_usage"\nfraction-fit = 2.0', 2, "fraction-fit=2.0"),
        ('metric = "cpu_usage"\nresume = "nowhere"', 2, "resume=nowhere: no such folder"),
        ("metric =", 2, "Invalid value"),
    ],
)
def test_a_run_configuration_can_be_checked_without_a_run(tmp_path, config, status, said):
    file = tmp_path / "run.toml"
    file.write_text(config)
    ended = subprocess.run(
        [sys.executable, "-m", "icos_fl_server", "check", str(file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert ended.returncode == status
    assert len(ended.stderr.splitlines()) == (1 if said else 0)
    assert said in ended.stderr
