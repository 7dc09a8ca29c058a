"""Weights on disk: whole or not there, found again, refused where they do not fit."""

import json

import numpy as np
import pytest
from icos_fl.federation.v1.weights import Flat
from icos_fl_server.checkpoints import ROUNDS_KEPT, Checkpoint, Checkpoints, load_run
from icos_fl_server.errors import ServerError
from safetensors import safe_open


def checkpoint(number, *shape):
    return Checkpoint(number, Flat.of({"w": np.full(shape or (2,), number, np.float32)}))


def test_a_checkpoint_tells_round_metric_and_run_configuration(tmp_path):
    Checkpoints(tmp_path, {"time-step": 40}).save("cpu", checkpoint(3))
    with safe_open(tmp_path / "cpu" / "round-00003.safetensors", "np") as file:
        metadata = file.metadata()
    assert (metadata["round"], metadata["metric"]) == ("3", "cpu")
    assert json.loads(metadata["run-config"]) == {"time-step": 40}


def test_the_newest_rounds_are_kept_and_no_temporary_file(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    for number in range(1, ROUNDS_KEPT + 4):
        checkpoints.save("cpu", checkpoint(number))
    kept = [f"round-{number:05d}.safetensors" for number in range(4, ROUNDS_KEPT + 4)]
    assert sorted(path.name for path in (tmp_path / "cpu").iterdir()) == [
        "latest.safetensors",
        *kept,
    ]


def test_a_new_run_in_an_old_folder_keeps_its_own_rounds(tmp_path):
    for number in (8, 9, 10, 11, 12, 1):
        Checkpoints(tmp_path, {}).save("cpu", checkpoint(number))
    assert (tmp_path / "cpu" / "round-00001.safetensors").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save("cpu", checkpoint(1))

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ServerError, match="No space left on device"):
        checkpoints.save("cpu", checkpoint(2))
    assert load_run(tmp_path, ("cpu",))["cpu"].round == 1


@pytest.mark.parametrize("inner", [".", "checkpoints"])
def test_a_run_is_found_by_its_result_folder_and_by_its_checkpoints(tmp_path, inner):
    Checkpoints(tmp_path / "checkpoints", {}).save("cpu", checkpoint(4))
    found = load_run(tmp_path / inner, ("cpu", "power"))
    assert list(found) == ["cpu"]
    assert found["cpu"].round == 4
    np.testing.assert_array_equal(found["cpu"].weights.named()["w"], [4, 4])


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ServerError, match="no such folder"):
        load_run(tmp_path / "none", ("cpu",))


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ServerError, match="no checkpoint of cpu, power in it"):
        load_run(tmp_path, ("cpu", "power"))


def test_a_file_that_is_no_checkpoint_is_refused_by_its_name(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "latest.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ServerError, match=r"cpu/latest\.safetensors is not a checkpoint"):
        load_run(tmp_path, ("cpu",))


def test_a_run_resumes_from_the_weights_and_counts_rounds_on(run, make_node, tmp_path):
    Checkpoints(tmp_path / "old", {}).save("cpu_usage", checkpoint(7))
    node = make_node("a", 2.0)
    run(node, resume=str(tmp_path / "old"))
    new = load_run(run.folder, ("cpu_usage",))["cpu_usage"]
    assert (new.round, new.weights.vector.tolist()) == (8, [9.0, 9.0])
    config = node.trained()[0].content.config_records["config"]
    assert (config["server-round"], config["model-round"]) == (8, 7)


def test_a_checkpoint_of_another_shape_is_refused_with_tensor_and_shapes(run, make_node, tmp_path):
    Checkpoints(tmp_path / "old", {}).save("cpu_usage", checkpoint(7, 3, 4))
    with pytest.raises(ServerError) as caught:
        run(make_node("a"), resume=str(tmp_path / "old"))
    assert str(caught.value) == (
        "resume: checkpoint of cpu_usage: tensor 'w' has shape (3, 4), the nodes' model has (2,)"
    )
    assert run.history["reason"] == str(caught.value)
