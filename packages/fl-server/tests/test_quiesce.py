"""A run that is asked to end does so after the round in hand; the next one goes on from there."""

import subprocess
import sys
import threading
import time

import pytest
from icos_fl_server.errors import ServerError
from icos_fl_server.quiesce import Request, quiesce


def in_the_first_round(run, ask):
    """What a node does that calls *ask*, and replies when the run has been asked to end."""
    asked = []

    def behave(_node, _reply):
        if not asked:
            asked.append(ask())
            wait_until_asked(run)

    return behave


def wait_until_asked(run):
    while not (run.folder / "run.lock").stat().st_size:
        time.sleep(0.01)


def quiesces(run):
    ask = threading.Thread(target=quiesce, args=(run.folder, 60.0))
    return in_the_first_round(run, ask.start)


def test_the_round_in_hand_is_the_last_one(run, make_node):
    node = make_node("a", behave=quiesces(run))
    history = run(node, num_server_rounds=5)
    assert (history["state"], history["reason"]) == ("quiesced", "asked to; 4 of 5 rounds are left")
    assert [entry["state"] for entry in history["rounds"]] == ["finished"]
    assert len(node.trained()) == 1


def test_the_round_in_hand_is_judged(run, make_node):
    history = run(make_node("a", loss=0.5, behave=quiesces(run)), num_server_rounds=5)
    assert history["rounds"][0]["metrics"]["cpu_usage"]["eval_loss"] == 0.5
    assert (run.folder / "checkpoints/cpu_usage/best.safetensors").exists()


def test_the_next_run_goes_on_where_it_ended(run, make_node):
    run(make_node("a", behave=quiesces(run)), num_server_rounds=5)
    node = make_node("a")
    history = run(node, num_server_rounds=4, resume=str(run.folder))
    assert history["state"] == "finished"
    rounds = [m.content["config"]["server-round"] for m in node.trained()]
    assert rounds == [2, 3, 4, 5]


def test_asked_in_the_last_round_a_run_is_finished(run, make_node):
    history = run(make_node("a", behave=quiesces(run)), num_server_rounds=1)
    assert history["state"] == "finished"


def test_a_run_that_waits_for_nodes_ends_at_once(run, make_node):
    def ask():
        while not (run.folder / "run.lock").exists():
            time.sleep(0.01)
        (run.folder / "run.lock").write_bytes(b"quiesce\n")

    threading.Thread(target=ask).start()
    history = run(make_node("a"), min_available_clients=2, node_timeout=60, num_server_rounds=3)
    assert (history["state"], history["rounds"]) == ("quiesced", [])


def test_the_command_tells_how_the_run_ended(run, make_node):
    command = [sys.executable, "-m", "icos_fl_server", "quiesce", str(run.folder.parent)]
    said = []

    def ask():
        said.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))

    behave = in_the_first_round(run, ask)
    run(make_node("a", behave=behave), num_server_rounds=3)
    told, _ = said[0].communicate(timeout=60)
    assert f"{run.folder}: quiesced: asked to; 2 of 3 rounds are left\n" == told
    assert said[0].returncode == 0


def test_without_a_run_there_is_nothing_to_wait_for(run, make_node):
    run(make_node("a"))
    assert quiesce(run.folder, 0.0) == []


@pytest.mark.parametrize("folder", ["nowhere", "empty", "file"])
def test_a_folder_without_a_run_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ServerError, match=f"{folder}: no run was ever in it"):
        quiesce(tmp_path / folder, 0.0)


def test_a_round_that_takes_longer_than_one_waits_is_told(run):
    with Request(run.folder).awaited(), pytest.raises(ServerError, match=r"within 0\.1 s"):
        quiesce(run.folder, 0.1)


def test_what_was_asked_of_a_run_is_not_asked_of_the_next(run, make_node):
    run.folder.mkdir()
    (run.folder / "run.lock").write_bytes(b"quiesce\n")
    assert run(make_node("a"), num_server_rounds=2)["state"] == "finished"


def test_two_runs_in_one_folder_are_refused(run, make_node):
    with (
        Request(run.folder).awaited(),
        pytest.raises(ServerError, match="another run goes on in"),
    ):
        run(make_node("a"))
