"""Whose place a SuperNode takes; test_secure.py has the real ones, killed in a round."""

from pathlib import Path

import pytest
from icos_fl_warm_runtime.flower.returning import Place

KEY = b"public key"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    return tmp_path


def test_who_comes_after_knows_who_was_there():
    place = Place(KEY)
    assert place.dead_id is None
    place.take(1 << 63)
    del place  # as a process does that ends
    assert Place(KEY).dead_id == 1 << 63
    assert Place(b"another key").dead_id is None


def test_of_one_who_is_there_nobody_knows():
    place = Place(KEY)
    place.take(7)
    assert Place(KEY).dead_id is None


def test_a_file_that_was_cut_off_is_no_node(home):
    Place(KEY).take(7)
    (file,) = home.glob("icos-fl-nodes/*")
    file.write_text("")
    assert Place(KEY).dead_id is None


def test_a_folder_that_cannot_be_written_is_no_obstacle(home):
    (home / "icos-fl-nodes").write_text("a file")
    place = Place(KEY)
    place.take(7)
    assert place.dead_id is None
