"""Protos and names in Flower's messages, against the last release of icos-fl-protos."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from icos_fl.federation.v1 import records, weights

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).parent / "buf"


def buf(*arguments: object) -> str:
    """What buf complains about."""
    done = subprocess.run([BUF, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    assert bool(done.stdout) == bool(done.returncode)
    return done.stdout


@pytest.fixture(scope="module")
def last(last_releases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder protos of the last release."""
    folder: Path = last_releases["icos-fl-protos"].extract(tmp_path_factory.mktemp("protos"))
    return folder


def broken(today: Path, last: Path) -> str:
    return buf("breaking", today, "--config", ROOT / "protos/buf.yaml", "--against", last)


def test_buf_lint_finds_nothing():
    assert buf("lint", ROOT / "protos") == ""


def test_buf_breaking_finds_nothing(last: Path):
    assert broken(ROOT / "protos", last) == ""


@pytest.mark.parametrize(
    ("was", "becomes", "told"),
    [
        ("standard_deviation =", "sd =", '"standard_deviation"'),
        ("  repeated string nodes = 1;\n", "", '"nodes"'),
        ("uint32 lookback = 4;", "uint32 lookback = 9;", '"lookback"'),
        ("rpc GetLatest(", "rpc GetNewest(", '"GetLatest"'),
    ],
)
def test_a_broken_proto_is_caught_by_its_name(
    last: Path, tmp_path: Path, was: str, becomes: str, told: str
):
    copy = tmp_path / "protos"
    shutil.copytree(ROOT / "protos/icos_fl", copy / "icos_fl")
    proto = copy / "icos_fl/processor/v1/processor_service.proto"
    assert was in proto.read_text()
    proto.write_text(proto.read_text().replace(was, becomes))

    assert told in broken(copy, last)


def module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"last_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # its dataclasses look there
    spec.loader.exec_module(found)
    return found


def names(of: ModuleType) -> dict[str, object]:
    """Constants of a module, which are what is in a message."""
    return {name: value for name, value in vars(of).items() if name.isupper()}


@pytest.fixture
def last_weights(last: Path) -> ModuleType:
    return module(last / "src/icos_fl/federation/v1/weights.py")


def test_names_and_protocol_in_flowers_messages_are_those_of_the_last_release(last, last_weights):
    last_records = module(last / "src/icos_fl/federation/v1/records.py")
    for was, now in ((last_records, records), (last_weights, weights)):
        assert names(was).items() <= names(now).items()
    key = last_records.number("train", "system.cpu.time", "num-examples")
    assert records.split_number(key) == ("train", "system.cpu.time", "num-examples")
    assert records.number("train", "system.cpu.time", "num-examples") == key


@pytest.mark.parametrize("old_sends", [True, False])
def test_weights_of_either_version_are_read_by_the_other(last_weights, old_sends: bool):
    sender, receiver = (last_weights, weights) if old_sends else (weights, last_weights)
    tensors = {"head.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((), "f4")}

    array, config = sender.pack({"cpu_usage": sender.Flat.of(tensors)})
    received = receiver.unpack(array, config)["cpu_usage"].named()

    assert list(received) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(received[name], tensor)


@pytest.mark.parametrize(
    ("package", "command", "prefix"),
    [
        ("icos-fl-otlp-bridge", "icos_fl_otlp_bridge", "ICOS_FL_BRIDGE_"),
        ("icos-fl-processor", "icos_fl_processor", "ICOS_FL_PROCESSOR_"),
        ("icos-fl-timeseries-store", "icos_fl_timeseries_store serve kv", "ICOS_FL_STORE_"),
    ],
)
def test_the_last_release_says_which_later_setting_it_does_not_start_with(
    last_releases, tmp_path: Path, package: str, command: str, prefix: str
):
    siblings = {"icos-fl-protos", "icos-fl-service", "icos-fl-timeseries-store", package}
    sources = [last_releases[name].extract(tmp_path / name) / "src" for name in siblings]
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        env={"PYTHONPATH": ":".join(map(str, sources)), f"{prefix}OF_TOMORROW": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"{prefix}OF_TOMORROW: no such setting" in done.stderr
