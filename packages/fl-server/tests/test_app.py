"""What a run leaves behind, however it ends: history, tracking, model state."""

import builtins
import json
import socket
import struct
import time

import pytest
from icos_fl_server.errors import ServerError
from icos_fl_timeseries_store import connect
from icos_fl_timeseries_store.testing import running_store


def test_the_history_of_a_finished_run_has_the_documented_form(run, make_node):
    history = run(make_node("a", loss=0.5))
    (entry,) = history["rounds"]
    assert entry.pop("started_unix_s") > 1.7e9
    assert 0 <= entry.pop("seconds") < 60
    assert history == {
        "protocol": 1,
        "run": "7",
        "state": "finished",
        "reason": "",
        "metrics": ["cpu_usage"],
        "rounds_total": 1,
        "nodes": {"a": {"id": "101", "metrics": {"cpu_usage": 10}, "cause": "", "versions": []}},
        "rounds": [
            {
                "round": 1,
                "state": "finished",
                "reason": "",
                "metrics": {
                    "cpu_usage": {
                        "train_loss": 0.5,
                        "eval_loss": 0.5,
                        "mae": 2.0,
                        "naive_mae": 3.0,
                        "num_examples": 10,
                        "nodes": 1,
                    }
                },
                "nodes": {"a": {"state": "ok", "cause": ""}},
            }
        ],
    }


def test_the_history_says_running_while_a_round_runs(run, make_node):
    seen = []

    def behave(_node, _reply):
        seen.append((run.history["state"], run.history["rounds"][-1]["state"]))

    run(make_node("a", behave=behave))
    assert seen[0] == ("running", "running")


def test_a_bad_setting_is_in_the_history(run, make_node):
    with pytest.raises(ServerError):
        run(make_node("a"), num_server_rounds=0)
    assert run.history["state"] == "failed"
    assert "num-server-rounds=0" in run.history["reason"]


def test_an_error_of_our_own_is_in_the_history_and_fails_the_run(run, make_node, monkeypatch):
    run.grid.get_node_ids = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run()
    assert run.history["reason"] == "ZeroDivisionError: division by zero"


def test_an_interrupted_run_is_failed(run, make_node):
    def interrupted():
        raise KeyboardInterrupt

    run.grid.get_node_ids = interrupted
    with pytest.raises(KeyboardInterrupt):
        run()
    assert (run.history["state"], run.history["reason"]) == ("failed", "interrupted")


def test_a_result_folder_that_cannot_be_made_is_told_with_its_place(run, make_node, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match=r"result-dir: .*file/run\.lock cannot be written"):
        run(make_node("a"), result_dir=str(tmp_path / "file"))


def test_a_store_that_is_down_is_logged_once_and_ends_nothing(run, make_node, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    history = run(make_node("a"), num_server_rounds=2, store_address=f"127.0.0.1:{port}")
    assert history["state"] == "finished"
    assert capsys.readouterr().err.count("model state not kept") == 1


def test_latest_and_best_model_are_in_the_store(run, make_node, tmp_path):
    losses = iter([9.0, 1.0, 5.0])

    def behave(_node, reply):
        reply["metrics"]["evaluate.cpu_usage.eval-loss"] = next(losses)

    with running_store(tmp_path / "store") as settings:
        address = f"{settings.host}:{settings.port}"
        run(make_node("a", behave=behave), num_server_rounds=2, store_address=address)
        with connect(settings) as store:
            state = store.model_state("server", "cpu_usage")
            latest, best = state.get("latest"), state.get("best")
    assert (latest.round, latest.weights["w"].tolist()) == (2, [2.0, 2.0])
    assert (best.round, best.metadata["eval_loss"]) == (1, 1.0)
    assert latest.config["metric"] == "cpu_usage"


def test_weights_and_biases_gets_one_run_a_metric_with_the_round_as_step(
    run, make_node, tmp_path, monkeypatch
):
    pytest.importorskip("wandb", reason="the extra of that name is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    both = {"cpu_usage": 10, "power": 10}
    node = make_node("a", examples=both)
    run(node, metric="cpu_usage,power", use_wandb=True, num_server_rounds=2)
    expected = [
        ("ICOS-FL", "cpu_usage-ServerApp", [(1, 2.0), (2, 2.0)]),
        ("ICOS-FL", "power-ServerApp", [(1, 2.0), (2, 2.0)]),
    ]
    # wandb's own process writes the files, and may end after the run that it serves.
    deadline = time.monotonic() + 60
    while (written := wandb_files(tmp_path)) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert written == expected


def wandb_files(folder):
    files = (folder / "wandb").glob("offline-run-*/*.wandb")
    return sorted((wandb_file(path) for path in files), key=str)


def wandb_file(path):
    """Project, name, and (step, mae) of each line, from what wandb keeps to be sent later."""
    from wandb.proto.wandb_internal_pb2 import Record

    project = name = None
    steps = []
    for data in log_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            project, name = record.run.project, record.run.display_name
        if record.HasField("history"):
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            steps.append((int(items["_step"]), float(items["mae"])))
    return project, name, steps


def log_records(content):
    """Records of a LevelDB log, the form of a .wandb file: blocks of 32 KiB, parts of records."""
    position, whole = 7, b""  # after the file's own header
    while position + 7 <= len(content):
        _crc, length, kind = struct.unpack_from("<IHB", content, position)
        if kind == 0:  # the rest of a block that no header fits in
            position += -position % 32768 or 32768
            continue
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""
        if -position % 32768 < 7:
            position += -position % 32768


def test_weights_and_biases_that_is_not_installed_is_told_at_the_start(run, make_node, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    node = make_node("a")
    with pytest.raises(ServerError, match=r"install icos-fl-server\[wandb\]"):
        run(node, use_wandb=True)
    assert node.received == []


def test_the_history_is_never_seen_in_part(run, make_node):
    """A reader in the middle of a run always finds JSON."""
    texts = []

    def behave(_node, _reply):
        texts.append((run.folder / "history.json").read_text())

    run(*[make_node(name, behave=behave) for name in "abc"], num_server_rounds=3)
    assert len([json.loads(text) for text in texts]) == 12  # 3 nodes, 3 rounds and the last word
