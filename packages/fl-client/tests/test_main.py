"""The command: JSON or lines on standard output, one line a problem, and an exit code."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from icos_fl_client.__main__ import main
from icos_fl_client.node import build_model, weights_of
from icos_fl_client.settings import RunConfig, parse
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import ModelVersion, StoreSettings, connect


@dataclass
class Ended:
    code: int | str
    out: str
    err: str


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Runs ``icos-fl-client`` with these arguments."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["icos-fl-client", *arguments])
        code: int | str = 0
        try:
            main()
        except SystemExit as ended:
            code = 0 if ended.code is None else ended.code
        if isinstance(code, str):  # Python prints it and exits with 1
            print(code, file=sys.stderr)
            code = 1
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.fixture
def services(address: str, dataclay: StoreSettings) -> list[str]:
    return ["--processor", address, "--store", f"{dataclay.host}:{dataclay.port}"]


@pytest.fixture
def keep(dataclay: StoreSettings, small_run) -> Callable[[str, str], None]:
    """Keeps a model in dataClay, and gives the node a window there with that column."""

    def put(node: str, metric: str) -> None:
        run = parse(RunConfig, small_run | {"metric": metric}, "run config")
        with connect(dataclay) as store:
            store.create_window(node).append([metric], np.array([1]), np.array([[1.0]]))
            store.model_state(node, metric).put(
                ModelVersion(5, weights_of(build_model(run, metric)), run.model_config_of(metric))
            )

    return put


def test_json_is_all_that_is_on_standard_output(command, services, keep, windows, wave):
    windows.put("json", "cpu_usage", [wave(40)], [wave(20)])
    keep("json", "cpu_usage")

    ended = command("forecast", *services, "--json")

    assert ended.code == 0
    answer = json.loads(ended.out)
    assert [item["node"] for item in answer["forecasts"]] == ["json"]


def test_metrics_are_those_of_which_a_model_is_kept(command, services, keep, windows, wave):
    for metric in ("cpu_usage", "power"):
        windows.put("some", metric, [wave(40)], [wave(20)])
    keep("some", "power")

    answer = json.loads(command("backtest", *services, "--json").out)

    assert [item["metric"] for item in answer["results"]] == ["power"]
    assert answer["unavailable"] == []


def test_nodes_and_metrics_may_be_chosen(command, services, keep, windows, wave):
    for node in ("one", "two", "three"):
        windows.put(node, "cpu_usage", [wave(40)], [wave(20)])
        keep(node, "cpu_usage")
    chosen = ["--node", "one", "--node", "two", "--metric", "cpu_usage", "--metric", "power"]

    answer = json.loads(command("forecast", *services, *chosen, "--json").out)

    assert [(item["node"], item["metric"]) for item in answer["forecasts"]] == [
        ("one", "cpu_usage"),
        ("two", "cpu_usage"),
    ]
    assert [item["metric"] for item in answer["unavailable"]] == ["power", "power"]


def test_a_forecast_is_a_line_for_people(command, services, keep, windows, wave):
    windows.put("line", "cpu_usage", [wave(40)], [wave(20)])
    keep("line", "cpu_usage")

    ended = command("forecast", *services)

    (line,) = ended.out.splitlines()
    assert line.startswith("line  cpu_usage: ")
    assert line.endswith(" % in 30 s")


def test_a_backtest_is_a_line_for_people(command, services, keep, windows, wave):
    windows.put("line", "cpu_usage", [wave(40)], [wave(20)])
    keep("line", "cpu_usage")

    (line,) = command("backtest", *services).out.splitlines()

    assert line.startswith("line  cpu_usage: mean absolute error in %: federated ")
    assert "; best: " in line


def test_a_forecast_of_none_exits_with_1_and_each_reason(command, services, windows, wave):
    windows.put("bare", "cpu_usage", [wave(40)], [wave(20)])

    ended = command("forecast", *services, "--node", "bare", "--metric", "cpu_usage", "--json")

    assert ended.code == 1
    assert json.loads(ended.out)["forecasts"] == []
    assert ended.err == "icos-fl-client: bare keeps no model of cpu_usage\n"


def test_no_node_at_all_is_told(command, services):
    ended = command("forecast", *services)

    assert (ended.code, ended.err) == (1, "icos-fl-client: no node keeps a model yet\n")


def test_an_unknown_node_is_told_with_those_that_there_are(command, services, keep, windows, wave):
    windows.put("known", "cpu_usage", [wave(40)], [wave(20)])
    keep("known", "cpu_usage")

    ended = command("forecast", *services, "--node", "unknown")

    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith("icos-fl-client: no window of node 'unknown'")
    assert "known" in line.partition("nodes with a window")[2]


def test_an_unknown_node_does_not_cost_the_others_theirs(command, services, keep, windows, wave):
    windows.put("known", "cpu_usage", [wave(40)], [wave(20)])
    keep("known", "cpu_usage")

    ended = command("forecast", *services, "--node", "unknown", "--node", "known", "--json")

    answer = json.loads(ended.out)
    assert ended.code == 0
    assert [item["node"] for item in answer["forecasts"]] == ["known"]
    assert answer["unavailable"] == [
        {
            "node": "unknown",
            "metric": "cpu_usage",
            "reason": "no window of node 'unknown'; nodes with a window: known",
        }
    ]


def test_what_is_named_twice_is_answered_once(command, services, keep, windows, wave):
    windows.put("twice", "cpu_usage", [wave(40)], [wave(20)])
    keep("twice", "cpu_usage")
    named = ["--node", "twice", "--metric", "cpu_usage"] * 2

    answer = json.loads(command("forecast", *services, *named, "--json").out)

    assert len(answer["forecasts"]) == 1


def test_a_processor_that_is_not_there_is_told_at_once(command, dataclay):
    nobody = f"127.0.0.1:{free_port()}"

    ended = command(
        "forecast", "--processor", nobody, "--store", f"{dataclay.host}:{dataclay.port}"
    )

    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith(f"icos-fl-client: the processor at {nobody}: UNAVAILABLE: ")


def test_a_store_that_is_not_there_is_told(command, address):
    port = free_port()

    ended = command("forecast", "--processor", address, "--store", f"127.0.0.1:{port}")

    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith("icos-fl-client: ")
    assert str(port) in line


@pytest.mark.parametrize("option", ["--processor", "--store"])
def test_an_address_without_a_port_is_refused_by_its_option(command, services, option):
    ended = command("backtest", *services, option, "nowhere")

    assert ended.code == 2
    assert ended.err.splitlines()[-1] == (
        f"icos-fl-client backtest: error: argument {option}: 'nowhere' must be host:port, "
        "with a port from 1 to 65535"
    )


def test_what_to_do_must_be_said(command):
    ended = command()

    assert ended.code == 2
    assert "required: command" in ended.err


def test_a_run_configuration_can_be_checked_without_a_run(command, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('metric = "cpu_usage"\nlearning-rate = 20.0\n')
    ended = command("check", str(file))
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("bad run config: learning-rate=20.0: ")

    file.write_text('metric = "cpu_usage"\n')
    assert command("check", str(file)).code == 0


def test_a_model_that_cannot_be_built_is_told_without_a_run(command, tmp_path, own_model):
    file = tmp_path / "run.toml"
    file.write_text(f'metric = "cpu_usage"\nmodel = "{own_model}:nothing"\n')
    ended = command("check", str(file))
    assert ended.code == 2
    assert ended.err == f"model '{own_model}:nothing': {own_model} has no nothing\n"

    file.write_text(f'metric = "cpu_usage"\nmodel = "{own_model}:rise"\n')
    assert command("check", str(file)).code == 0


def test_files_for_the_processor_are_taken_as_a_nodes(command, services, tmp_path):
    ended = command("forecast", *services, "--processor-certificate", "a.pem")
    assert ended.code == 1
    assert "processor-certificate and processor-key need each other" in ended.err

    (tmp_path / "token").write_text("a-token-of-some-length")
    (tmp_path / "token").chmod(0o604)
    ended = command("backtest", *services, "--processor-token", str(tmp_path / "token"))
    assert ended.code == 1
    assert f"{tmp_path}/token: others may read or write it; chmod o= " in ended.err
