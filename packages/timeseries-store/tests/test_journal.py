"""The file of a window: what is read back of it, whole, cut, and with wrong bytes."""

import errno
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from icos_fl_timeseries_store import ModelVersion, StoreDamaged, codec, journal
from icos_fl_timeseries_store.buffer import RowBuffer
from icos_fl_timeseries_store.journal import FRAMES_AT, Journal

# An example is as slow as the disk's syncs.
on_disk = settings(deadline=None, max_examples=50)
payloads = st.lists(st.binary(max_size=200), min_size=1, max_size=8)


def written(folder, frames):
    path = folder / "a.state"
    file = Journal.beside(path, [frames[0]])
    file.take_place()
    for frame in frames[1:]:
        file.append([frame])
    file.close()
    return path


def read(path):
    file, found = Journal.open(path)
    file.close()
    return [bytes(payload) for payload in found]


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@on_disk
@given(payloads)
def test_frames_come_back_as_they_were_written(tmp_path_factory, frames):
    assert read(written(tmp_path_factory.mktemp("journal"), frames)) == frames


@on_disk
@given(payloads, st.data())
def test_no_wrong_byte_is_read_as_data(tmp_path_factory, frames, data):
    path = written(tmp_path_factory.mktemp("journal"), frames)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = read(path)
    except StoreDamaged:
        pass
    else:
        # The mark is broken, so the end may be cut off; or the byte is between mark and frames.
        assert place < FRAMES_AT
        assert found == frames


@on_disk
@given(payloads, st.data())
def test_a_cut_of_what_was_acknowledged_is_reported(tmp_path_factory, frames, data):
    path = written(tmp_path_factory.mktemp("journal"), frames)
    os.truncate(path, data.draw(st.integers(0, path.stat().st_size - 1)))
    with pytest.raises(StoreDamaged):
        read(path)


@on_disk
@given(payloads, st.binary(min_size=1, max_size=300), st.data())
def test_an_end_that_nobody_was_told_of_is_cut_off(tmp_path_factory, frames, last, data):
    path = written(tmp_path_factory.mktemp("journal"), frames)
    acknowledged = path.read_bytes()
    file, _ = Journal.open(path)
    file.append([last])
    file.close()
    # As a power cut leaves it: part of the frame, and the mark as it was before.
    torn = acknowledged + path.read_bytes()[len(acknowledged) :]
    path.write_bytes(torn[: data.draw(st.integers(len(acknowledged), len(torn) - 1))])
    assert read(path) == frames
    assert path.read_bytes() == acknowledged


def test_zeros_at_the_end_are_cut_off_with_a_line(folder, caplog):
    path = written(folder, [b"state", b"change"])
    size = path.stat().st_size
    os.truncate(path, size + 500)
    assert read(path) == [b"state", b"change"]
    assert f"torn end cut off: file={path} bytes=500 kept={size}" in caplog.text


def test_a_whole_frame_that_was_not_marked_is_kept(folder):
    path = written(folder, [b"state"])
    before = path.read_bytes()
    file, _ = Journal.open(path)
    file.append([b"change"])
    file.close()
    path.write_bytes(before[:FRAMES_AT] + path.read_bytes()[FRAMES_AT:])
    assert read(path) == [b"state", b"change"]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(StoreDamaged):
        read(path)  # what has been read once is acknowledged


def test_damage_is_said_with_file_place_and_cure(folder):
    path = written(folder, [b"state", b"one", b"two"])
    content = bytearray(path.read_bytes())
    content[content.index(b"one")] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreDamaged) as error:
        read(path)
    place = FRAMES_AT + 16 + len(b"state")
    assert f"{path}: a broken frame at byte {place}, with 1 intact frames behind it" in str(
        error.value
    )
    assert "icos-fl-store repair" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"not a state" * 1000])
def test_a_file_that_is_no_journal_is_reported(folder, content):
    path = folder / "a.state"
    path.write_bytes(content)
    with pytest.raises(StoreDamaged):
        read(path)


def test_a_file_that_takes_a_place_has_what_came_meanwhile(folder):
    path = written(folder, [b"old state", b"one"])
    older, _ = Journal.open(path)
    since = older.end
    fresh = Journal.beside(path, [b"new state"])
    older.append([b"two"])
    assert read(path) == [b"old state", b"one", b"two"]
    fresh.take_place(older, since)
    fresh.append([b"three"])
    fresh.close()
    assert read(path) == [b"new state", b"two", b"three"]
    assert [file.name for file in folder.iterdir()] == ["a.state"]


def test_a_frame_that_finds_no_room_leaves_nothing(folder, monkeypatch):
    path = written(folder, [b"state"])
    file, _ = Journal.open(path)
    size = path.stat().st_size
    write = os.pwrite

    def full_after_ten_bytes(descriptor, data, at):
        if at >= size + 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:10], at)

    monkeypatch.setattr(journal.os, "pwrite", full_after_ten_bytes)
    with pytest.raises(OSError, match="No space left"):
        file.append([b"x" * 100])
    monkeypatch.undo()
    assert path.stat().st_size == size
    assert not file.spoilt
    file.append([b"later"])
    file.close()
    assert read(path) == [b"state", b"later"]


def test_a_failed_sync_spoils_the_file(folder, monkeypatch):
    file, _ = Journal.open(written(folder, [b"state"]))

    def broken(_descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(journal.os, "fdatasync", broken)
    with pytest.raises(OSError, match="Input/output"):
        file.append([b"x"])
    assert file.spoilt
    file.close()


numbers = st.floats(allow_infinity=False, width=64)
changes = st.lists(
    st.tuples(
        st.lists(st.sampled_from(["x", "ü", "a b"]), min_size=1, max_size=3, unique=True),
        st.lists(st.integers(1, 2**62), max_size=5),
        numbers,
    ),
    max_size=5,
)


@given(st.integers(1, 8), changes)
def test_a_window_is_the_same_from_its_snapshot_and_from_its_changes(capacity, batches):
    live, replayed = RowBuffer(capacity), RowBuffer(capacity)
    for columns, times, number in batches:
        new = codec.NewRows(
            tuple(columns),
            np.array(times, np.int64),
            np.full((len(times), len(columns)), number),
            dict.fromkeys(columns, "W"),
        )
        payload = b"".join(codec.changes_to_parts(live.cursor, [new, codec.NewCapacity(capacity)]))
        new.apply(live)
        cursor, again = codec.changes_from_payload(memoryview(payload))
        assert cursor == replayed.cursor
        for change in again:
            change.apply(replayed)
    whole = memoryview(b"".join(codec.window_to_parts(live.snapshot())))
    restored = RowBuffer.restored(codec.window_from_payload(whole))
    for other in (replayed, restored):
        mine, theirs = live.snapshot(), other.snapshot()
        assert (mine.columns, mine.units, mine.cursor) == (
            theirs.columns,
            theirs.units,
            theirs.cursor,
        )
        for name in ("times_ns_t", "values_tf", "revisions_t"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@given(st.dictionaries(st.text(max_size=5), shapes, max_size=4), st.integers(0, 10**9))
def test_a_model_comes_back_bit_by_bit(shape_of, seed):
    random_numbers = np.random.default_rng(seed)
    weights = {
        name: random_numbers.normal(size=shape).astype(np.float32)
        for name, shape in shape_of.items()
    }
    version = ModelVersion(3, weights, {"a": 1, "b": True, "c": "ü"}, {"loss": 0.1})
    payload = b"".join(codec.models_to_parts({"latest": version, "best": version}))
    again = codec.models_from_payload(memoryview(payload))
    assert again["latest"] is again["best"]
    found = again["latest"]
    assert (found.round, found.config, found.metadata) == (3, version.config, version.metadata)
    assert list(found.weights) == list(weights)
    for name, array in weights.items():
        assert (found.weights[name].shape, found.weights[name].dtype) == (array.shape, array.dtype)
        assert found.weights[name].tobytes() == array.tobytes()


def test_a_number_of_numpy_in_the_facts_is_stored():
    version = ModelVersion(1, {}, {}, {"loss": np.float32(0.5), "rows": np.int64(3)})
    payload = b"".join(codec.models_to_parts({"latest": version}))
    assert codec.models_from_payload(memoryview(payload))["latest"].metadata == {
        "loss": 0.5,
        "rows": 3,
    }


def test_random_bytes_behind_the_state_are_never_frames(folder):
    source = random.Random(1)
    path = written(folder, [b"state"])
    whole = path.read_bytes()
    for _ in range(200):
        garbage = source.randbytes(source.randrange(1, 100))
        path.write_bytes(whole + journal._FRAME_MAGIC + garbage)
        assert read(path) == [b"state"]
