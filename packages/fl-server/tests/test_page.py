"""The page of runs: what it tells of them and their nodes, and that nothing in them breaks it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from icos_fl_server.enrolment.superlink import Node as Member
from icos_fl_server.page.runs import ROUNDS_MAX
from icos_fl_server.page.service import Page, _add_members
from icos_fl_server.page.settings import PageSettings
from icos_fl_service.security import Security, load_security
from icos_fl_service.security import TlsSettings as NoTls
from icos_fl_service.settings import SettingsError, load
from icos_fl_service.testing import WebClient, free_port

TOKEN = "a-token-that-is-long-enough"


@pytest.fixture
def show() -> Iterator[Callable[..., WebClient]]:
    """Serves the page of a folder of runs."""
    pages: list[Page] = []

    def made(folder: Path, security: Security = Security()) -> WebClient:  # noqa: B008
        pages.append(Page("127.0.0.1:0", folder, None, security))
        return WebClient(pages[-1].port)

    yield made
    for each in pages:
        each.close()


@pytest.fixture
def client(show, run) -> WebClient:
    """Of the page of *run*'s folder."""
    return show(run.folder.parent)


def put(folder: Path, history: Any, *lines: str) -> Path:
    """A run's folder with that in it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = history if isinstance(history, str) else json.dumps(history)
    (folder / "history.json").write_text(text)
    (folder / "nodes.jsonl").write_text("".join(lines))
    return folder


def history_of(**changed: Any) -> dict[str, Any]:
    """As icos-fl-server 0.2.2 has written it: without ids and versions."""
    entry = {
        "round": 1,
        "state": "finished",
        "reason": "",
        "started_unix_s": 1.8e9,
        "seconds": 2.0,
        "metrics": {"cpu_usage": {"train_loss": 0.5, "eval_loss": None}},
        "nodes": {"a": {"state": "ok", "cause": ""}},
    }
    return {
        "protocol": 1,
        "run": "7",
        "state": "running",
        "reason": "",
        "metrics": ["cpu_usage"],
        "rounds_total": 3,
        "nodes": {"a": {"metrics": {"cpu_usage": 10}, "cause": ""}},
        "rounds": [entry],
    } | changed


def test_without_a_run_there_is_nothing_to_tell(show, tmp_path):
    told = show(tmp_path / "none").json("/api/run")
    assert (told["runs"], told["run"], told["nodes"], told["problem"]) == ([], None, [], "")


def test_it_tells_the_rounds_of_a_run_and_the_losses_of_all_nodes(client, run, make_node):
    run(make_node("a", loss=0.5), make_node("b", loss=1.5), num_server_rounds=2)
    told = client.json("/api/run")["run"]
    assert (told["state"], told["rounds_total"]) == ("finished", 2)
    assert [(each["round"], each["state"]) for each in told["rounds"]] == [
        (1, "finished"),
        (2, "finished"),
    ]
    assert abs(told["rounds"][1]["started"] - time.time()) < 60
    assert told["losses"] == {
        "cpu_usage": {
            "train_loss": [1.0, 1.0],
            "eval_loss": [1.0, 1.0],
            "mae": [2.0, 2.0],
            "naive_mae": [3.0, 3.0],
        }
    }


def test_it_tells_what_each_node_did_and_how_its_model_fares(client, run, make_node):
    def silent_about_power(node, reply):
        del reply["metrics"]["evaluate.cpu_usage.mae"]

    run(make_node("a", loss=0.5), make_node("b", loss=1.5, behave=silent_about_power))
    a, b = client.json("/api/run")["nodes"]
    assert (a["name"], a["examples"], a["cause"]) == ("a", {"cpu_usage": 10}, "")
    assert a["last"] == {"round": 1, "state": "ok", "cause": ""}
    known = {"train_loss": 0.5, "eval_loss": 0.5, "mae": 2.0, "naive_mae": 3.0}
    assert a["losses"] == {"cpu_usage": known}
    assert b["losses"]["cpu_usage"]["mae"] is None


def test_the_losses_of_a_node_are_told_by_round(client, run, make_node):
    run(make_node("a", loss=0.5), make_node("b", loss=1.5), num_server_rounds=2)
    told = client.json("/api/node?node=b")
    assert told["rounds"] == [1, 2]
    assert told["losses"]["cpu_usage"]["eval_loss"] == [1.5, 1.5]
    nobody = client.json("/api/node?node=nobody")
    assert nobody["losses"]["cpu_usage"]["eval_loss"] == [None, None]


def test_why_a_node_takes_no_part_is_told(client, run, make_node):
    def refuse(node, reply):
        raise ValueError("disk on fire")

    run(make_node("a"), make_node("b", behave=refuse))
    b = client.json("/api/run")["nodes"][1]
    assert b["last"] == {"round": 1, "state": "failed", "cause": "ValueError: disk on fire"}
    assert b["losses"] == {}


def test_the_versions_of_a_node_are_those_that_it_told_last(client, run, make_node):
    def told(node, reply):
        reply["node"]["versions"] = ["icos-fl-client 0.3.0"]

    def upgraded(node, reply):
        reply["node"]["versions"] = ["icos-fl-client 0.4.0", "flwr 1.42.0"]

    run(make_node("a", introduce=told), make_node("b", introduce=told, behave=upgraded))
    a, b = client.json("/api/run")["nodes"]
    assert a["versions"] == []  # back at a version that does not tell it
    assert b["versions"] == ["icos-fl-client 0.4.0", "flwr 1.42.0"]


@pytest.mark.parametrize("versions", ["0.3.0", 3, [1.5] * 9, ["x" * 1000] * 20])
def test_a_node_cannot_fill_the_page_with_its_versions(client, run, make_node, versions):
    def told(node, reply):
        reply["node"]["versions"] = versions

    run(make_node("a", introduce=told, behave=told))
    (a,) = client.json("/api/run")["nodes"]
    assert len(a["versions"]) <= 8
    assert all(len(version) <= 60 for version in a["versions"])


def test_numbers_of_a_node_that_are_none_are_left_out(client, run, make_node):
    def lie(node, reply):
        reply["metrics"]["evaluate.cpu_usage.mae"] = float("nan")
        reply["metrics"]["train.cpu_usage.train-loss"] = float("inf")

    run(make_node("a"), make_node("b", behave=lie))
    facts = client.json("/api/run")["nodes"][1]["losses"]["cpu_usage"]
    assert (facts["mae"], facts["train_loss"], facts["naive_mae"]) == (None, None, 3.0)


def test_the_newest_run_is_shown_and_older_ones_can_be_asked_for(show, tmp_path):
    put(tmp_path / "0001", history_of(run="1"))
    os.utime(tmp_path / "0001/history.json", (1e9, 1e9))
    put(tmp_path / "0002", history_of(run="2"))
    client = show(tmp_path)
    told = client.json("/api/run")
    assert [each["name"] for each in told["runs"]] == ["0002", "0001"]
    assert (told["name"], told["run"]["id"]) == ("0002", "2")
    assert client.json("/api/run?run=0001")["run"]["id"] == "1"


def test_the_result_folder_of_one_run_will_do(show, tmp_path):
    told = show(put(tmp_path, history_of())).json("/api/run")
    assert (told["name"], told["run"]["state"]) == (".", "running")


@pytest.mark.parametrize("name", ["../secret", "0001/../../secret", "/etc", "", "0002"])
def test_what_is_no_run_of_the_folder_is_not_read(show, tmp_path, name):
    put(tmp_path / "runs/0001", history_of())
    put(tmp_path / "secret", history_of())
    client = show(tmp_path / "runs")
    assert client.get(f"/api/run?run={name}x").status == 404
    if name:
        assert client.get(f"/api/run?run={name}").status == 404
        assert client.get(f"/api/node?run={name}").status == 404


@pytest.mark.parametrize(
    "history",
    [
        "",
        '{"protocol": 1, "run": "7", "sta',
        "[]",
        "null",
        "7",
        "\ufffd\x00",
        {},
        history_of(rounds=7),
        history_of(rounds=[{}]),
        history_of(rounds=["round"]),
        history_of(nodes=[]),
        history_of(nodes={"a": 1}),
        history_of(metrics=3),
        history_of(rounds_total="many"),
        history_of(metrics=["cpu_usage"], rounds=[history_of()["rounds"][0] | {"metrics": 1}]),
        history_of(rounds=[history_of()["rounds"][0] | {"nodes": {"a": None}}]),
    ],
)
def test_a_history_that_is_none_is_told_and_breaks_nothing(show, tmp_path, history):
    put(tmp_path, history)
    client = show(tmp_path)
    told = client.json("/api/run")
    problems = "the history is not in the form", f"{tmp_path}/history.json cannot be read"
    assert told["problem"].startswith(problems)
    assert told["nodes"] == []
    assert client.get("/api/node?node=a").status in (200, 500)


def test_the_history_of_an_older_server_is_shown_without_what_it_lacks(show, tmp_path):
    put(tmp_path, history_of())
    (tmp_path / "nodes.jsonl").unlink()
    client = show(tmp_path)
    (a,) = client.json("/api/run")["nodes"]
    assert (a["versions"], a["losses"], a["last"]["state"]) == ([], {}, "ok")
    assert client.json("/api/node?node=a")["rounds"] == []


def test_a_line_that_is_being_written_is_left_for_later(show, tmp_path):
    whole = json.dumps({"round": 1, "nodes": {"a": {"cpu_usage": {"mae": 2.0}}}}) + "\n"
    put(tmp_path, history_of(), whole, whole[:30])
    assert show(tmp_path).json("/api/node?node=a")["losses"]["cpu_usage"]["mae"] == [2.0]


def test_of_a_long_run_the_newest_rounds_are_told(show, tmp_path):
    entry = history_of()["rounds"][0]
    rounds = [entry | {"round": n} for n in range(1, 1001)]
    lines = [json.dumps({"round": n, "nodes": {}}) + "\n" for n in range(1, 1001)]
    put(tmp_path, history_of(rounds=rounds), *lines)
    client = show(tmp_path)
    told = client.json("/api/run")["run"]["rounds"]
    assert [told[0]["round"], told[-1]["round"]] == [1001 - ROUNDS_MAX, 1000]
    assert client.json("/api/node?node=a")["rounds"][0] == 1001 - ROUNDS_MAX


def test_what_is_written_next_is_shown_next(show, tmp_path):
    client = show(put(tmp_path, history_of()))
    assert client.json("/api/run")["run"]["state"] == "running"
    put(tmp_path, history_of(state="finished"))
    assert client.json("/api/run")["run"]["state"] == "finished"


def test_a_new_run_in_the_same_folder_begins_without_the_lines_of_the_old_one(
    client, run, make_node
):
    run(make_node("a"), num_server_rounds=3)
    run(make_node("b"), num_server_rounds=1)
    assert client.json("/api/node?node=b")["rounds"] == [1]


def test_nothing_of_a_run_is_told_to_web_sites_nor_without_a_token(show, tmp_path):
    put(tmp_path, history_of())
    for path in ("/api/run", "/api/node?node=a"):
        assert show(tmp_path).get(path, Host="evil.example").status == 403
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text(TOKEN)
    client = show(tmp_path, load_security(NoTls(), tokens))
    for path in ("/api/run", "/api/node?node=a"):
        assert client.get(path).status == 401
        assert client.get(path, Authorization=f"Bearer {TOKEN}", Host="fl.example").status == 200


def member(node_id: int, name: str = "", state: str = "online") -> Member:
    return Member(node_id, name, state, "2026-11-27T04:00:00+00:00", b"")


def test_who_is_online_is_told_of_those_in_the_run_by_id():
    nodes: list[dict[str, Any]] = [{"name": "a", "id": "1"}, {"name": "b", "id": "2"}]
    _add_members(nodes, (member(1, "b", "offline"),), newest=True)
    assert [node["online"]["state"] for node in nodes] == ["offline", "unknown"]


def test_who_never_took_part_is_told_beside_the_newest_run_alone():
    members = (member(1), member(2, "late"), member(3, "gone", "offline"), member(4, "", "offline"))
    of_newest: list[dict[str, Any]] = [{"name": "a", "id": "1"}]
    _add_members(of_newest, members, newest=True)
    assert [node["name"] for node in of_newest] == ["a", "gone", "late"]
    of_older: list[dict[str, Any]] = [{"name": "a", "id": "1"}]
    _add_members(of_older, members, newest=False)
    assert [node["name"] for node in of_older] == ["a"]


class Command:
    """``icos-fl-server page`` as a process."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.client, self.metrics = WebClient(free_port()), WebClient(free_port())
        self.log = folder / "page.log"
        env = {f"ICOS_FL_PAGE_{name}": value for name, value in settings.items()} | {
            "ICOS_FL_PAGE_LISTEN_ADDRESS": f"127.0.0.1:{self.client.port}",
            "ICOS_FL_PAGE_METRICS_ADDRESS": f"127.0.0.1:{self.metrics.port}",
            "ICOS_FL_PAGE_RUNS": str(folder),
        }
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "icos_fl_server", "page"],
                env=os.environ | env,
                stdout=stream,
                stderr=stream,
            )

    def until(self, true: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 60
        while True:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if found := true():
                    return found
            except OSError:
                pass
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    made: list[Command] = []

    def start(**settings: str) -> Command:
        made.append(Command(tmp_path, **settings))
        return made[-1]

    yield start
    for page in made:
        page.process.kill()
        page.process.wait(30)


def test_the_command_serves_takes_new_tokens_at_sighup_and_ends_at_sigterm(command, tmp_path):
    put(tmp_path / "0001", history_of())
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text(TOKEN)
    page = command(TOKENS=str(tokens))

    def status(token: str) -> int:
        return page.client.get("/api/run", Authorization=f"Bearer {token}").status

    page.until(lambda: status(TOKEN) == 200)
    assert page.metrics.json("/status")["part"] == "page"
    tokens.write_text(TOKEN[::-1])
    page.process.send_signal(signal.SIGHUP)
    page.until(lambda: status(TOKEN[::-1]) == 200)
    assert status(TOKEN) == 401
    page.process.terminate()
    assert page.process.wait(30) == 0


def test_a_superlink_that_is_away_is_told_and_the_run_shown_all_the_same(command, tmp_path):
    put(tmp_path / "0001", history_of())
    page = command(SUPERLINK=f"127.0.0.1:{free_port()}")
    told = page.until(
        lambda: (
            (found := page.client.json("/api/run"))["superlink"]["problem"].startswith(
                "the SuperLink at"
            )
            and found
        )
    )
    assert told["run"]["state"] == "running"
    assert told["nodes"][0]["online"] == {"state": "unknown", "since": ""}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"LISTEN_ADDRESS": "0.0.0.0:80", "INSECURE": "true"}, "give TOKENS"),
        ({"LISTEN_ADDRESS": "0.0.0.0:80", "TOKENS": "t"}, "give TLS__CERTIFICATE"),
        ({"SUPERLINK": "superlink:8000"}, "is on another machine: give AUTHORITY"),
        ({"ADDRESS": "127.0.0.1:1"}, "no such setting"),
    ],
)
def test_what_it_cannot_be_given_is_refused(monkeypatch, settings, said):
    for name, value in settings.items():
        monkeypatch.setenv(f"ICOS_FL_PAGE_{name}", value)
    with pytest.raises(SettingsError, match=said):
        load(PageSettings)
