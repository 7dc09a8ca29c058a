"""Steps in files: what is whole comes back, and what is not is fetched again."""

import os
import time

import numpy as np
import pytest
from icos_fl_client.kept import UNUSED_SECONDS_MAX, KeptSteps
from icos_fl_client.processor_client import ProcessorClient, Query

SERIES = b"processor and query"
VALUES = np.arange(12.0).reshape(4, 3)
QUERY = Query("a", "cpu_usage", (), 4, 2, 0.0, 0.75)


@pytest.fixture
def kept(tmp_path) -> KeptSteps:
    return KeptSteps(tmp_path)


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def test_what_was_saved_comes_back(kept):
    kept.save(SERIES, b"version", [VALUES[:3], VALUES[3:]])

    loaded = kept.load(SERIES)

    assert loaded.version == b"version"
    assert loaded.values_sf.tolist() == VALUES.tolist()


def test_the_last_save_replaces_those_before(kept, tmp_path):
    kept.save(SERIES, b"before", [np.ones((9, 2))])
    kept.save(SERIES, b"version", [VALUES[:3], VALUES[3:]])

    assert kept.load(SERIES).version == b"version"
    assert len(list(tmp_path.iterdir())) == 1


def test_another_series_has_nothing(kept):
    kept.save(SERIES, b"version", [VALUES[:3], VALUES[3:]])

    assert kept.load(b"another") is None


@pytest.mark.parametrize("size", [0, 1, 47, 48, 60, 150])
def test_a_file_cut_short_is_nothing(kept, tmp_path, size):
    kept.save(SERIES, b"version", [VALUES[:3], VALUES[3:]])
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes()[:size])

    assert kept.load(SERIES) is None


@pytest.mark.parametrize("place", [0, 8, 40, 44, 48, 60, -1])
def test_a_file_with_a_changed_byte_is_nothing(kept, tmp_path, place):
    kept.save(SERIES, b"version", [VALUES[:3], VALUES[3:]])
    path = only_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)

    assert kept.load(SERIES) is None


def test_a_file_of_another_series_under_the_name_is_nothing(kept, tmp_path):
    kept.save(b"another", b"version", [VALUES])
    data = only_file(tmp_path).read_bytes()
    only_file(tmp_path).unlink()
    kept.save(SERIES, b"version", [VALUES[:3], VALUES[3:]])
    only_file(tmp_path).write_bytes(data)

    assert kept.load(SERIES) is None


def test_a_file_that_no_round_used_for_a_day_is_removed(kept, tmp_path):
    kept.save(SERIES, b"version", [VALUES[:3], VALUES[3:]])
    old = time.time() - UNUSED_SECONDS_MAX - 60
    os.utime(only_file(tmp_path), (old, old))
    kept.save(b"another", b"version", [VALUES])

    kept.remove_unused()

    assert kept.load(SERIES) is None
    assert kept.load(b"another") is not None


def test_a_file_in_use_is_not_removed(kept, tmp_path):
    kept.save(SERIES, b"version", [VALUES[:3], VALUES[3:]])
    old = time.time() - UNUSED_SECONDS_MAX - 60
    os.utime(only_file(tmp_path), (old, old))
    kept.load(SERIES)

    kept.remove_unused()

    assert kept.load(SERIES) is not None


def test_a_folder_that_is_gone_costs_the_round_nothing(windows, address, tmp_path):
    windows.put("a", "cpu_usage", [np.arange(6.0)], [])
    kept = KeptSteps(tmp_path / "gone")
    kept.save(SERIES, b"version", [VALUES[:3], VALUES[3:]])

    with ProcessorClient(address, deadline_seconds=20, kept=kept) as processor:
        assert processor.sequences(QUERY).train_sequences == 1


def test_a_processor_that_knows_of_no_increments_is_asked_for_all(windows, address, tmp_path):
    windows.put("a", "cpu_usage", [np.arange(6.0)], [])

    with ProcessorClient(address, deadline_seconds=20, kept=KeptSteps(tmp_path)) as processor:
        (run,) = processor.sequences(QUERY).train

    assert len(run.rows_tf) == 6
    assert list(tmp_path.iterdir()) == []
