"""``icos-fl backtest``: on traces of which one can tell by hand, and on a real forecaster."""

import csv
import io
import json
import multiprocessing
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from icos_fl.federation.v1.weights import Flat
from icos_fl_client.credentials import Credentials
from icos_fl_client.forecasting import Combination
from icos_fl_client.forecasting.anchor_lstm import anchors
from icos_fl_client.serving.board import Board
from icos_fl_client.serving.follower import Follower, Following
from icos_fl_client.serving.kept import KeptState
from icos_fl_client.serving.server import Server
from icos_fl_local import forecasts, run_config, traces
from icos_fl_local.backtest import command, report
from icos_fl_local.backtest.combined import Replays, Run, _learn, of_forecaster
from icos_fl_local.backtest.found import Found, Judged
from icos_fl_local.backtest.recorded import HORIZONS, Replayed, of_traces
from icos_fl_local.backtest.running import ForecasterClient, of_node
from icos_fl_local.errors import LocalError, UsageError
from icos_fl_server.checkpoints import Checkpoint, Checkpoints
from icos_fl_service.security import Security, TlsSettings, load_security
from icos_fl_service.testing import Browser, chromium
from icos_fl_timeseries_store import MemoryStore
from rich.console import Console

ROOT = Path(__file__).parents[3]
SECOND = 10**9
START_S = 1_700_000_000
STEP_S = 15
ROWS = 400


def write_trace(file: Path, step_s: int = STEP_S, **columns: np.ndarray) -> None:
    file.parent.mkdir(exist_ok=True)
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(["time_unix_s", *columns])]
    lines += [f"{START_S + n * step_s},{','.join(map(repr, row))}" for n, row in enumerate(rows)]
    file.write_text("\n".join(lines).replace("np.float64(", "").replace(")", "") + "\n")


def walk(count: int = ROWS) -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.clip(50 + 30 * np.sin(np.arange(count) / 9) + rng.normal(size=count), 0, 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ramp of 2 W a step, a constant CPU; and a node that moves."""
    folder = tmp_path_factory.mktemp("traces")
    write_trace(folder / "ramp.csv", power_w=2.0 * np.arange(ROWS), cpu_percent=np.full(ROWS, 25.0))
    write_trace(folder / "walker.csv", cpu_percent=walk())
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    return of_traces(folder, Replayed(nodes=(), metrics=(), horizons=("5m", "1m")))


def entry(found: Found, node: str, metric: str, horizon: str) -> dict[str, Any]:
    (one,) = (
        each
        for each in report.as_json(found)["results"]
        if (each["node"], each["metric"], each["horizon"]) == (node, metric, horizon)
    )
    return one


def scores(entry: dict[str, Any]) -> dict[str, Any]:
    return {score["forecaster"]: score for score in entry["forecasters"]}


def test_last_value_is_behind_a_ramp_by_as_much_as_it_rises(found: Found) -> None:
    last = scores(entry(found, "ramp", "power_consumption", "5m"))["last"]
    assert last == {"forecaster": "last", "origins": ROWS - 20, "mae": 2.0 * 20, "ratio": 1.0}


def test_constant_has_no_error_and_no_ratio(found: Found) -> None:
    combination = scores(entry(found, "ramp", "cpu_usage", "1m"))["combination"]
    assert (combination["mae"], combination["ratio"]) == (0.0, None)


def test_every_forecaster_is_told_beside_the_baselines(found: Found) -> None:
    names = list(scores(entry(found, "walker", "cpu_usage", "1m")))
    combined = [name for name in Combination([4, 20]).names if name in names]
    assert names == ["combination", "window-mean", *combined]
    assert combined[0] == "last"
    assert [name for name in combined if name.startswith("memory")]


def test_seasonal_repeat_is_best_of_a_day_that_comes_again(tmp_path: Path) -> None:
    day = np.random.default_rng(0).uniform(0, 100, 24)
    write_trace(tmp_path / "daily.csv", 3600, cpu_percent=np.tile(day, 4))

    found = of_traces(tmp_path, Replayed(nodes=(), metrics=(), horizons=("2h",)))

    repeat = scores(entry(found, "daily", "cpu_usage", "2h"))["seasonal-repeat"]
    assert repeat == {"forecaster": "seasonal-repeat", "origins": 72, "mae": 0.0, "ratio": 0.0}


def test_csv_has_every_forecast_and_gives_the_figures_of_the_json(
    found: Found, tmp_path: Path
) -> None:
    report.write_csv(tmp_path / "a.csv", found)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))

    for figures in report.as_json(found)["results"]:
        about = figures["node"], figures["metric"], str(figures["step"])
        here = [row for row in rows if (row["node"], row["metric"], row["step"]) == about]
        known = [row for row in here if row["actual"]]
        errors = [abs(float(row["yhat"]) - float(row["actual"])) for row in known]
        combination = scores(figures)["combination"]
        assert (len(here), len(known)) == (ROWS, combination["origins"])
        assert np.mean(errors) == pytest.approx(combination["mae"], abs=1e-12)
        ahead = {float(row["time_unix_s"]) - float(row["origin_unix_s"]) for row in here}
        assert ahead == {figures["step"] * 15.0}
        for interval in figures["intervals"]:
            level = interval["percent"]
            inside = [
                float(row[f"lower_{level}"]) <= float(row["actual"]) <= float(row[f"upper_{level}"])
                for row in known
                if row[f"lower_{level}"]
            ]
            assert (len(inside), np.mean(inside)) == (interval["origins"], interval["coverage"])


def test_each_node_and_metric_is_a_line_where_no_terminal_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_traces(folder, Replayed(nodes=(), metrics=(), horizons=("1m",)))
    assert capsys.readouterr() == (
        "",
        "1 of 3: ramp, power_consumption\n2 of 3: ramp, cpu_usage\n3 of 3: walker, cpu_usage\n",
    )


def test_actual_is_what_the_trace_had_then(found: Found, tmp_path: Path) -> None:
    report.write_csv(tmp_path / "a.csv", found)
    with (tmp_path / "a.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["metric"] == "power_consumption"]
    for row in rows:
        if row["actual"]:
            # A row stands in the middle of its step.
            place = (float(row["time_unix_s"]) - STEP_S / 2 - START_S) / STEP_S
            assert float(row["actual"]) == pytest.approx(2.0 * place, abs=1.0)


def test_what_comes_later_changes_no_earlier_forecast(found: Found, tmp_path: Path) -> None:
    changed = walk()
    changed[300:] = 99.0
    write_trace(tmp_path / "walker.csv", cpu_percent=changed)

    options = Replayed(nodes=(), metrics=(), horizons=("5m", "1m"))
    (other,) = of_traces(tmp_path, options).judged

    (same,) = (each for each in found.judged if each.node == "walker")
    for name in ("yhat_th", "quantile_tqh", "said_tkh"):
        mine, its = getattr(same.record, name), getattr(other.record, name)
        np.testing.assert_array_equal(mine[:300], its[:300])
        assert not np.array_equal(mine[300:], its[300:], equal_nan=True)


def test_tables_fit_a_narrow_terminal(found: Found) -> None:
    written = io.StringIO()
    report.show(found, Console(file=written, width=140))
    shown = written.getvalue()
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 100
    assert re.search(r"ramp +1m +396 +8\.00", shown)
    assert re.search(r"window-mean +\d", shown)


def test_page_has_the_figures_and_asks_no_other_host(found: Found, tmp_path: Path) -> None:
    report.write_page(tmp_path / "a.html", found)
    page = (tmp_path / "a.html").read_text()
    for metric in ("power_consumption", "cpu_usage"):
        assert f"<h2>{metric}" in page
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|https?://", page)
    words = report.row(entry(found, "walker", "cpu_usage", "5m"))
    assert all(f">{words[name]}</td>" in page for name in words)


SHOWN = """
const text = (of) => of.checkVisibility() ? of.innerText : "unseen";
const rows = [...document.querySelectorAll("h2 + .scroll tbody tr")].map((row) =>
  [row.closest(".scroll").previousElementSibling, row.cells[0], row.cells[1]].map(text));
const plots = [...document.images].filter((plot) => plot.naturalWidth > 300).map((plot) =>
  plot.checkVisibility() ? plot.alt : "unseen");
return [rows, plots];
"""


def test_a_browser_shows_a_row_and_a_plot_of_every_node_and_metric(
    found: Found, tmp_path: Path
) -> None:
    pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    report.write_page(tmp_path / "a.html", found)
    with chromium() as driver:
        browser = Browser(driver, (tmp_path / "a.html").as_uri())
        browser.open()
        rows, plots = driver.execute_script(SHOWN)
        assert browser.errors() == []
    results = report.as_json(found)["results"]
    expected = sorted((each["metric"], each["node"], each["horizon"]) for each in results)
    assert expected == sorted((title.split()[0], node, ahead) for title, node, ahead in rows)
    expected = sorted({f"{each['node']}, {each['metric']}" for each in results})
    assert expected == sorted(alt.split(":")[0] for alt in plots)


def test_grid_is_what_coarse_rows_allow(tmp_path: Path) -> None:
    write_trace(tmp_path / "coarse.csv", 300, cpu_percent=walk(60))

    found = of_traces(tmp_path, Replayed(nodes=(), metrics=(), horizons=("1m", "5m")))

    assert [each["horizon"] for each in report.as_json(found)["results"]] == ["5m"]
    assert found.notes == [
        "coarse: horizon 1m is 0.2 steps of 300 s; 1 to 4096 whole ones are needed"
    ]


def test_gap_ends_what_is_judged(tmp_path: Path) -> None:
    write_trace(tmp_path / "gap.csv", cpu_percent=walk(100))
    lines = (tmp_path / "gap.csv").read_text().splitlines()
    (tmp_path / "gap.csv").write_text("\n".join(lines[:51] + lines[60:]) + "\n")

    found = of_traces(tmp_path, Replayed(nodes=(), metrics=(), horizons=("1m",)))

    assert scores(entry(found, "gap", "cpu_usage", "1m"))["last"]["origins"] == (50 - 4) + (41 - 4)


def test_intervals_that_are_not_there_or_did_not_hold_are_told(tmp_path: Path) -> None:
    write_trace(tmp_path / "short.csv", cpu_percent=walk(35))
    calm = 10 + np.random.default_rng(3).normal(0, 0.01, 60)
    write_trace(tmp_path / "surge.csv", cpu_percent=[*calm, *(10 + 0.1 * 1.07 ** np.arange(90))])

    found = of_traces(tmp_path, Replayed(nodes=(), metrics=(), horizons=("5m",)))

    of_80, of_95 = entry(found, "surge", "cpu_usage", "5m")["intervals"]
    assert found.notes == [
        "short, cpu_usage: 5m ahead no intervals: fewer than 20 forecasts had come to their end",
        "surge, cpu_usage: 5m ahead the intervals of 80 % and 95 % held "
        f"{100 * of_80['coverage']:.0f} % and {100 * of_95['coverage']:.0f} %: do not rely on them",
    ]


class Forecaster:
    """The real service, on a store that has the rows of a trace."""

    def __init__(self, trace: traces.Trace, security: Security = Security()) -> None:  # noqa: B008
        store = MemoryStore()
        columns = [traces.column_of(name) for name in trace.columns]
        units = dict(zip(columns, trace.units, strict=True))
        window = store.create_window(trace.node, len(trace.times_s))
        window.append(columns, trace.times_s * SECOND, trace.values_tf, units)
        following = Following(STEP_S * SECOND, (60 * SECOND, 300 * SECOND), recorded=True)
        board = Board()
        follower = Follower(following, board, KeptState(None))
        address = "127.0.0.1:0"
        self.server = Server(lambda: store, follower, board, address, security=security)
        self.server.start()
        self.address = f"localhost:{self.server.port}"
        self.board = board

    def wait(self, metrics: int) -> None:
        count, posted = self.board.since(0)
        while len(posted) < metrics:
            self.board.wait(count, 60.0, lambda: False)
            count, posted = self.board.since(0)


@pytest.fixture(scope="module")
def forecaster(folder: Path) -> Iterator[Forecaster]:
    service = Forecaster(traces.load(folder)[1])
    service.wait(1)
    yield service
    service.server.stop()


def test_node_that_runs_is_judged_by_what_it_said(forecaster: Forecaster, found: Found) -> None:
    """On the rows of a trace it has said what a replay says, and the figures are the same."""
    with ForecasterClient(forecaster.address) as client:
        judged = of_node(client, (), ())

    mine = report.as_json(judged)["results"]
    assert len(mine) == 2
    for figures in mine:
        its = entry(found, "walker", "cpu_usage", figures["horizon"])
        assert figures == its


def test_metric_without_a_forecast_says_why(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Forecaster(traces.load(folder)[0])
    try:
        service.wait(2)
        assert forecasts.tell(service.address, [], as_json=False) == 0
        assert "ramp  cpu_usage: none: 400 values in a row are 25" in capsys.readouterr().out
        with ForecasterClient(service.address) as client:
            found = of_node(client, (), ())
    finally:
        service.server.stop()
    assert [each.metric for each in found.judged] == ["power_consumption"]
    assert found.notes[0].startswith("ramp, cpu_usage: no forecast now: 400 values in a row are 25")


def test_forecast_is_what_the_forecaster_says(
    forecaster: Forecaster, capsys: pytest.CaptureFixture[str]
) -> None:
    (outlook,) = forecaster.board.outlooks()
    said = outlook.forecast
    assert said is not None
    assert outlook.last_time_ns is not None

    assert forecasts.tell(forecaster.address, ["walker"], as_json=True) == 0
    (found,) = json.loads(capsys.readouterr().out)["forecasts"]
    assert (found["node"], found["metric"], found["unit"]) == ("walker", "cpu_usage", "%")
    assert (found["round"], found["model_age_seconds"]) == (None, None)
    assert found["no_model"] == "walker keeps no model of cpu_usage yet"
    assert found["time_unix_s"] == [outlook.last_time_ns / 1e9 + ahead for ahead in (60, 300)]
    assert found["yhat"] == said.yhat_h.tolist()
    assert found["upper_95"] == said.upper_95_h.tolist()

    assert forecasts.tell(forecaster.address, ["walker"], as_json=False) == 0
    text = capsys.readouterr().out
    when = time.strftime("on %F at %T", time.localtime(outlook.last_time_ns / 1e9))
    line = rf"walker  cpu_usage: {when} {outlook.last_value:.4g} %; in 1m {said.yhat_h[0]:.4g} "
    assert re.match(rf"{line}\(80 %: [0-9.]+ to [0-9.]+\); in 5m [0-9.]+ \(.*\)\n$", text)


def test_a_horizon_without_an_interval_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trace(tmp_path / "young.csv", cpu_percent=walk(30))
    service = Forecaster(traces.load(tmp_path)[0])
    try:
        service.wait(1)
        assert forecasts.tell(service.address, [], as_json=False) == 0
    finally:
        service.server.stop()
    *_, told, why = capsys.readouterr().out.splitlines()
    assert re.search(r"; in 1m [\d.]+ \(80 %: .*\); in 5m [\d.]+ \(no interval yet\)$", told)
    assert why == ("no interval yet: fewer than 20 forecasts this far ahead have come to their end")


def test_forecaster_with_tls_and_tokens_is_asked_by_files(folder: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    issued.private_key_pem.write_to_path(tmp_path / "server.key")
    (tmp_path / "token").write_text("a-token-of-some-length\n")
    for name in ("server.key", "token"):
        (tmp_path / name).chmod(0o600)
    tls = TlsSettings(certificate=tmp_path / "server.pem", key=tmp_path / "server.key")
    service = Forecaster(traces.load(folder)[1], load_security(tls, tmp_path / "token"))
    try:
        service.wait(1)
        files = Credentials(ca=tmp_path / "ca.pem", token=tmp_path / "token", whose="forecaster")
        with ForecasterClient(service.address, files) as client:
            assert [each.node for each in of_node(client, (), ()).judged] == ["walker"]
        for files, cause in (
            (Credentials(ca=tmp_path / "ca.pem"), "UNAUTHENTICATED"),
            (Credentials(whose="forecaster"), "it asks for TLS, and there is no forecaster-ca"),
        ):
            client = ForecasterClient(service.address, files)
            with client, pytest.raises(LocalError, match=cause):
                of_node(client, (), ())
    finally:
        service.server.stop()


def icos_fl(*arguments: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "icos_fl_local", "backtest", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"metrics": ["gpu"]}, "no node has the metric 'gpu'; there are: cpu_usage"),
        ({"nodes": ["nobody"]}, "no node 'nobody'; there are: ramp, walker"),
        ({"horizons": ["soon"]}, "--horizon 'soon' is no duration such as 90s, 5m, 1h or 1d"),
        ({"horizons": ["5s"]}, "walker: horizon 5s is 0.3333 steps of 15 s; 1 to 4096 whole"),
        ({"horizons": ["40s"]}, "walker: horizon 40s is 2.6667 steps of 15 s; 1 to 4096 whole"),
        ({"horizons": ["2d"]}, "walker: horizon 2d is 11520 steps of 15 s; 1 to 4096 whole"),
        ({"horizons": ["4h"]}, "cpu_usage: nothing came 4h after a forecast, in 400 steps with a"),
        ({"interval_seconds": 5}, "walker: rows are 15 s apart, more than a step of 5 s"),
        ({"model": Path("nothing")}, "--model nothing is no checkpoint of icos-fl-server:"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_traces_do_not_have_is_refused(folder: Path, asked: dict[str, Any], line: str) -> None:
    chosen = {"nodes": ["walker"], "metrics": (), "horizons": ["1m"], **asked}
    with pytest.raises(UsageError, match=re.escape(line)):
        command.replay(folder, Replayed(**chosen), command.Output(json=False, csv=None, html=None))


def test_file_that_cannot_be_written_is_refused_before_the_work(folder: Path) -> None:
    output = command.Output(json=False, csv=folder, html=None)
    with pytest.raises(UsageError, match="cannot be written: a folder has that name"):
        command.replay(folder / "nowhere", Replayed((), (), ("1m",)), output)


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["--traces", "nowhere"], 2, "nowhere is not a folder"),
        (["--horizon", "5m"], 2, "--horizon is for --traces: a forecaster has its own"),
        (["--forecaster", "127.0.0.1:1"], 1, "forecaster at 127.0.0.1:1: UNAVAILABLE"),
        ([], 3, "no deployment runs there"),
    ],
    ids=["traces", "horizon", "away", "nothing"],
)
def test_command_refuses(tmp_path: Path, arguments: list[str], status: int, line: str) -> None:
    ended = icos_fl(*arguments, cwd=tmp_path)
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (status, "", 1)
    assert line in ended.stderr


def test_a_replay_that_dies_ends_it_with_the_reason(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        shutil.copy(folder / "walker.csv", tmp_path / f"walker-{number:02}.csv")
    killed = []

    def kill_one() -> None:
        while not (there := multiprocessing.active_children()):
            time.sleep(0.01)
        there[0].kill()
        killed.append(there[0].pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        with pytest.raises(LocalError, match="a process that replays the traces died"):
            of_traces(tmp_path, Replayed(nodes=(), metrics=(), horizons=("1m",)))
    finally:
        killer.join()
    assert len(killed) == 1
    assert multiprocessing.active_children() == []


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The default model of cpu_usage: 8 steps of input, 4 ahead, all weights 0; by the server."""
    gates, units, logits = 8, 2, 4 * anchors(8, 4).shape[1]
    shapes = {
        "lstm.weight_ih_l0": (gates, 1),
        "lstm.weight_hh_l0": (gates, units),
        "lstm.bias_ih_l0": (gates,),
        "lstm.bias_hh_l0": (gates,),
        "head.weight": (logits, units),
        "head.bias": (logits,),
    }
    weights = Flat.of({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    run = {"metric": "cpu_usage", "time-step": 8, "horizon": 4, "server-only": "whatever"}
    Checkpoints(tmp_path, run).save("cpu_usage", Checkpoint(7, weights))
    return tmp_path / "cpu_usage" / "latest.safetensors"


def test_model_is_one_more_forecaster_and_may_have_seen_these_rows(
    folder: Path, checkpoint: Path
) -> None:
    options = Replayed(("walker",), (), ("1m", "5m"), model=checkpoint)
    found = of_traces(folder, options)

    near, far = (scores(entry(found, "walker", "cpu_usage", h)) for h in ("1m", "5m"))
    assert near["model"]["origins"] == ROWS - 7 - 4  # after one lookback
    assert "model" not in far  # 20 steps; it was trained for 4
    assert found.notes == [f"{checkpoint} may have been trained on these rows"]


def test_model_of_other_steps_takes_no_part_and_says_why(folder: Path, checkpoint: Path) -> None:
    options = Replayed(("walker",), (), ("1m",), interval_seconds=60, model=checkpoint)
    found = of_traces(folder, options)

    assert "model" not in scores(entry(found, "walker", "cpu_usage", "1m"))
    assert found.notes[1].startswith("walker, cpu_usage: the model of round 7 cannot be used: its ")


def test_model_of_another_metric_is_refused(folder: Path, checkpoint: Path) -> None:
    options = Replayed((), ("power_consumption",), ("1m",), model=checkpoint)
    with pytest.raises(UsageError, match="is of cpu_usage; asked for are: power_consumption"):
        of_traces(folder, options)


LOOKBACK = 8
NOWHERE = Path("nowhere")
FIRST_SCORED = 320 + LOOKBACK - 1
RUN = run_config.complete({"time-step": LOOKBACK}, ["cpu_usage"], 2, STEP_S, "")


def combined(
    folder: Path, checkpoints: Path, metrics: tuple[str, ...] = ("cpu_usage",), **config: Any
) -> dict[str, Any]:
    with Replays(traces.load(folder), metrics, {**RUN, **config}) as replays:
        return replays.judge(checkpoints)


def by_pair(entries: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(each["node"], each["metric"]): each for each in entries}


def figures(judged: Judged, step: int, first: int) -> dict[str, Any]:
    """Those of an entry that are of the forecasts from *first* on, computed from the record."""
    record = judged.record
    place = record.steps_h.tolist().index(step)
    yhat_t, actual_t = record.yhat_th[first:, place], record.actual_th[first:, place]
    last_t, bound_tq = record.values_t[first:], record.quantile_tqh[first:, :, place]
    inside_t = (bound_tq[:, 1] <= actual_t) & (actual_t <= bound_tq[:, 2])
    return {
        "origins": int(np.isfinite(actual_t).sum()),
        "mae": pytest.approx(np.nanmean(np.abs(yhat_t - actual_t)), rel=1e-12),
        "last_value_mae": pytest.approx(np.nanmean(np.abs(last_t - actual_t)), rel=1e-12),
        "held": pytest.approx(inside_t[np.isfinite(actual_t)].mean(), rel=1e-12),
        "yhat": yhat_t[-1],
        "lower_80": bound_tq[-1, 1],
        "upper_80": bound_tq[-1, 2],
        "last_time_unix_s": judged.end_unix_s_t[-1],
        "plotted": yhat_t[-10:].tolist(),
    }


def test_figures_beside_a_run_are_those_of_backtest_on_the_same_rows(folder: Path) -> None:
    """Without a model, as backtest has none; with the horizons that a node has."""
    options = Replayed(("walker",), ("cpu_usage",), HORIZONS)
    (judged,) = of_traces(folder, options).judged

    entry = by_pair(combined(folder, NOWHERE)["results"])["walker", "cpu_usage"]
    expected = figures(judged, 20, FIRST_SCORED)
    plotted = entry["plot"]["panels"]["5m"]["yhat"][-10:]
    told = {**entry, "held": entry["coverage"]["80"], "plotted": plotted}
    assert {name: told[name] for name in expected} == expected
    assert entry["origins"] == ROWS - FIRST_SCORED - 20


def test_model_takes_part_in_what_is_scored(folder: Path, checkpoint: Path) -> None:
    asked = {"horizon": 4, "metrics": ("cpu_usage",)}
    alone, with_model = (
        by_pair(combined(folder, checkpoints, **asked)["results"])["walker", "cpu_usage"]
        for checkpoints in (NOWHERE, checkpoint.parents[1])
    )
    assert (alone["step"], alone["origins"]) == (with_model["step"], with_model["origins"])
    assert alone["mae"] != with_model["mae"]


def test_model_has_no_part_in_what_is_learned_from_the_rows_that_it_was_trained_on(
    folder: Path,
) -> None:
    learned = _learn(traces.load(folder)[1], "cpu_usage", STEP_S, Run.of(RUN))

    assert len(learned.rest.values_t) == ROWS - FIRST_SCORED
    error_kh, _ = learned.combination.errors()
    silent = [
        n for n, e in zip(learned.combination.names, error_kh, strict=True) if np.isnan(e[-1])
    ]
    assert silent == ["model"]


def test_what_is_scored_begins_where_no_window_has_a_row_of_the_training_part() -> None:
    values_t = np.arange(200.0)
    values_t[::2] = np.nan  # 100 steps, 80 to train on
    assert Run.of(RUN).first_scored(values_t) == 2 * (80 + LOOKBACK - 1) + 1


def test_window_that_is_too_short_to_score_still_has_a_forecast(tmp_path: Path) -> None:
    write_trace(tmp_path / "short.csv", cpu_percent=walk(60))
    (entry,) = combined(tmp_path, tmp_path, **{"time-step": 40})["results"]
    assert (entry["origins"], entry["mae"], entry["coverage"]) == (0, None, {})
    assert entry["lower_80"] < entry["yhat"] < entry["upper_80"]


@pytest.fixture
def own_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a module of one's own that repeats the last value, from 8 steps, 4 ahead."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "repeats_the_last.py").write_text(
        "import torch\n\n\n"
        "class Repeat(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.weight = torch.nn.Parameter(torch.ones(1))\n\n"
        "    def forward(self, windows):\n"
        "        return self.weight * windows[:, -1:, 0].expand(-1, 4)\n\n\n"
        "def build(**_):\n"
        "    return Repeat()\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    run = {"metric": "cpu_usage", "time-step": 8, "horizon": 4, "model": "repeats_the_last:build"}
    weights = Flat.of({"weight": np.ones(1, np.float32)})
    Checkpoints(tmp_path, run).save("cpu_usage", Checkpoint(7, weights))
    return tmp_path / "cpu_usage" / "latest.safetensors"


def test_model_of_ones_own_is_fed_as_on_a_node(folder: Path, own_checkpoint: Path) -> None:
    found = of_traces(folder, Replayed(("walker",), (), ("1m",), model=own_checkpoint))

    said = scores(entry(found, "walker", "cpu_usage", "1m"))
    assert said["model"]["origins"] == ROWS - 7 - 4
    assert said["model"]["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert found.notes == [f"{own_checkpoint} may have been trained on these rows"]


def test_model_of_ones_own_takes_part_beside_a_run(folder: Path, own_checkpoint: Path) -> None:
    asked = {"horizon": 4, "time-step": 8}
    found = combined(folder, own_checkpoint.parents[1], **asked)
    assert found["notes"] == []
    alone, with_model = (
        by_pair(each["results"])["walker", "cpu_usage"]
        for each in (combined(folder, NOWHERE, **asked), found)
    )
    assert alone["origins"] == with_model["origins"]
    assert alone["mae"] != with_model["mae"]


def test_model_that_cannot_be_imported_is_left_out_and_told(folder: Path, tmp_path: Path) -> None:
    run = {"metric": "cpu_usage", "time-step": 8, "horizon": 4, "model": "no_such_thing:build"}
    weights = Flat.of({"weight": np.ones(1, np.float32)})
    Checkpoints(tmp_path, run).save("cpu_usage", Checkpoint(7, weights))

    found = combined(folder, tmp_path, horizon=4)
    told = "walker, cpu_usage: the model of round 7 cannot be used: "
    assert [note for note in found["notes"] if note.startswith(told)] != []
    assert found["results"] == combined(folder, NOWHERE, horizon=4)["results"]


@pytest.mark.parametrize(
    ("interval_s", "horizon", "step"), [(15.0, 20, 20), (15.0, 5, 5), (60.0, 5, 5), (900.0, 1, 1)]
)
def test_step_ahead_is_the_models_that_is_nearest_to_five_minutes(
    interval_s: float, horizon: int, step: int
) -> None:
    assert Run.of({**RUN, "horizon": horizon}).ahead(interval_s) == step


def test_rows_that_are_too_far_apart_are_told(folder: Path) -> None:
    found = combined(folder, NOWHERE, interval=5.0)
    assert found == {
        "results": [],
        "notes": [
            f"{node}: rows are 15 s apart, more than a step of 5 s" for node in ("ramp", "walker")
        ],
    }


def test_replay_that_dies_is_told_and_ends_nothing_else(folder: Path) -> None:
    with Replays(traces.load(folder), ["cpu_usage"], RUN) as replays:
        for process in multiprocessing.active_children():
            process.kill()
        found = replays.judge(NOWHERE)
    assert found == {
        "results": [],
        "notes": ["No combination: a process that replays the traces died."],
    }


def test_no_process_is_left(folder: Path) -> None:
    with Replays(traces.load(folder), ["cpu_usage"], RUN):
        assert multiprocessing.active_children() != []
    assert multiprocessing.active_children() == []


def ahead(last_time_unix_s: float, **told: str) -> Mapping[str, Any]:
    """What is needed of the federated model's own forecast."""
    pair = {"node": "walker", "metric": "cpu_usage"}
    return {**pair, **told, "last_time_unix_s": last_time_unix_s}


def alone(start: int) -> list[Mapping[str, Any]]:
    """What is needed of the federated model's own backtest, of rows from number *start* on."""
    start_s = START_S + start * STEP_S
    return [{"node": "walker", "metric": "cpu_usage", "validation_start_unix_s": start_s}]


def test_forecaster_says_what_a_replay_says(folder: Path, forecaster: Forecaster) -> None:
    found = of_forecaster(forecaster.address, RUN, [ahead(0.0)], alone(320))

    replayed = by_pair(combined(folder, NOWHERE)["results"])
    assert found == {"results": [replayed["walker", "cpu_usage"]], "notes": []}


def test_a_forecaster_that_knows_only_rows_of_the_validation_part_is_judged_by_all(
    forecaster: Forecaster,
) -> None:
    (entry,) = of_forecaster(forecaster.address, RUN, [ahead(0.0)], alone(-1000))["results"]
    assert entry["origins"] == ROWS - 20


@pytest.mark.parametrize("backtests", [[], alone(399)], ids=["none", "young"])
def test_a_young_window_has_a_forecast_and_a_word_about_its_error(
    forecaster: Forecaster, backtests: list[Mapping[str, Any]]
) -> None:
    found = of_forecaster(forecaster.address, RUN, [ahead(0.0)], backtests)

    (entry,) = found["results"]
    assert (entry["origins"], entry["mae"], entry["coverage"]) == (0, None, {})
    assert entry["lower_80"] < entry["yhat"] < entry["upper_80"]
    assert found["notes"] == [
        "walker, cpu_usage: no error of the combination yet: no row that no node trained on came "
        "5m after a forecast"
    ]


@pytest.mark.parametrize(
    ("asked", "note"),
    [
        (ahead(2e9), "walker, cpu_usage: the forecaster is still going through the rows"),
        (ahead(0, metric="fan"), "walker, fan: the forecaster does not follow it"),
    ],
)
def test_what_the_forecaster_cannot_say_is_told(
    forecaster: Forecaster, asked: Mapping[str, Any], note: str
) -> None:
    assert of_forecaster(forecaster.address, RUN, [asked], []) == {"results": [], "notes": [note]}


def test_forecaster_that_is_away_is_told() -> None:
    found = of_forecaster("127.0.0.1:1", RUN, [ahead(0.0)], [])
    assert found["results"] == []
    assert found["notes"][0].startswith("forecaster at 127.0.0.1:1: UNAVAILABLE")


def test_commands_of_the_docs_run(folder: Path, tmp_path: Path, forecaster: Forecaster) -> None:
    """Those of docs/backtest.md, on a shorter trace and the forecaster that is there."""
    shown = re.search(r"```sh\n(.*?)```", (ROOT / "docs/backtest.md").read_text(), re.DOTALL)
    assert shown
    for line in shown[1].splitlines():
        asked = line.replace("deploy/local/src/icos_fl_local/traces", str(folder))
        asked = asked.replace("pfe1", "walker").replace("127.0.0.1:50052", forecaster.address)
        uv, run, name, _, *arguments = shlex.split(asked)
        ended = icos_fl(*arguments, cwd=tmp_path)
        told = "1 of 1: walker, cpu_usage\n" if "--traces" in arguments else ""
        assert (uv, run, name, ended.returncode) == ("uv", "run", "icos-fl", 0)
        assert ended.stderr == told
    assert json.loads(ended.stdout)["source"] == f"forecaster at {forecaster.address}"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["backtest.html", "forecasts.csv"]
