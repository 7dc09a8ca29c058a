"""Windows on disk, in this process: what an append costs the disk, and what survives what."""

import asyncio
import errno
import os
import random
import threading

import numpy as np
import pytest
from icos_fl_timeseries_store import ModelVersion, StoreDamaged, StoreUnavailable, durable, journal
from icos_fl_timeseries_store.durable import StateFolder
from icos_fl_timeseries_store.errors import InvalidRows, StoreFull

SEED = 20261125


def column(*values):
    return np.array(values, float)[:, None]


async def put(window, *times):
    return await window.append(["x"], np.array(times, np.int64), column(*times))


def times_of(window):
    return window.read().times_ns_t.tolist()


@pytest.fixture
def folder(tmp_path):
    return tmp_path


async def again(folder, alias="window.a"):
    """The window as another process would find it."""
    return await StateFolder(folder).window(alias, None)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


def test_what_was_appended_is_there_again(folder):
    async def main():
        window = await StateFolder(folder).window("window.a", 3)
        await put(window, 1, 2)
        appended = await window.append(["y"], np.array([2, 3, 4]), column(1, 2, 3), {"y": "W"})
        assert (appended.added, appended.merged, appended.removed) == (2, 1, 1)
        found = (await again(folder)).read()
        assert found.times_ns_t.tolist() == [2, 3, 4]
        assert found.units == ("", "W")
        assert found.cursor == appended.cursor

    run(main())


def test_appends_that_meet_go_to_disk_together(folder, monkeypatch):
    syncs = []
    sync = os.fdatasync

    def counted(descriptor):
        syncs.append(descriptor)
        sync(descriptor)

    monkeypatch.setattr(journal.os, "fdatasync", counted)

    async def main():
        window = await StateFolder(folder).window("window.a", 1000)
        appended = await asyncio.gather(*(put(window, time) for time in range(1, 201)))
        assert len({each.cursor for each in appended}) == 200
        assert len(syncs) <= 3
        assert times_of(await again(folder)) == list(range(1, 201))

    run(main())


def test_nothing_can_be_read_before_it_is_on_disk(folder, monkeypatch):
    syncing, go_on = threading.Event(), threading.Event()
    sync = os.fdatasync

    def held(descriptor):
        syncing.set()
        assert go_on.wait(60)
        sync(descriptor)

    async def main():
        window = await StateFolder(folder).window("window.a", 10)
        monkeypatch.setattr(journal.os, "fdatasync", held)
        append = asyncio.create_task(put(window, 1))
        await asyncio.to_thread(syncing.wait, 60)
        assert times_of(window) == []
        assert not append.done()
        go_on.set()
        await append
        assert times_of(window) == [1]

    run(main())


def test_rows_of_a_writer_that_went_away_are_there_or_not_but_the_next_are(folder):
    async def main():
        window = await StateFolder(folder).window("window.a", 10)
        gone = asyncio.create_task(put(window, 1))
        await asyncio.sleep(0)
        gone.cancel()
        await put(window, 2)
        assert times_of(window)[-1] == 2
        assert times_of(await again(folder)) == times_of(window)

    run(main())


def test_a_file_does_not_grow_without_end(folder, monkeypatch):
    monkeypatch.setattr(durable, "JOURNAL_BYTES_MIN", 20_000)

    async def main():
        window = await StateFolder(folder).window("window.a", 100)
        largest = 0
        for start in range(1, 20_000, 60):
            await put(window, *range(start, start + 60))
            largest = max(largest, (folder / "windows" / "a.state").stat().st_size)
        assert largest < 60_000
        assert times_of(await again(folder)) == times_of(window)
        await window.close()
        assert [file.name for file in (folder / "windows").iterdir()] == ["a.state"]

    run(main())


def test_a_file_does_not_grow_with_the_number_of_kills(folder, monkeypatch):
    monkeypatch.setattr(durable, "JOURNAL_BYTES_MIN", 4_000)
    monkeypatch.setattr(durable, "JOURNAL_FACTOR", 1)

    async def main():
        largest = 0
        for life in range(20):
            window = await StateFolder(folder).window("window.a", 10)
            for time in range(50 * life + 1, 50 * life + 51):
                await put(window, time)
                largest = max(largest, (folder / "windows" / "a.state").stat().st_size)
            await window.close()  # leaves the file as a kill would
        assert largest < 16_000

    run(main())


def test_appends_go_on_while_the_window_is_written_anew(folder, monkeypatch):
    monkeypatch.setattr(durable, "JOURNAL_BYTES_MIN", 1)
    monkeypatch.setattr(durable, "JOURNAL_FACTOR", 0)
    go_on = threading.Event()
    sync = os.fsync

    def held(descriptor):
        assert go_on.wait(60)
        sync(descriptor)

    async def main():
        window = await StateFolder(folder).window("window.a", 100)
        monkeypatch.setattr(journal.os, "fsync", held)
        for time in range(1, 51):
            await put(window, time)
        assert len(list((folder / "windows").glob("*.new"))) == 1
        go_on.set()
        await put(window, 51)
        await window.close()
        assert times_of(await again(folder)) == list(range(1, 52))

    run(main())


def cut(content, place):
    return content[:place]


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


def zero(content, place):
    """The page of *place*."""
    start = place - place % 4096
    return content[:start] + bytes(len(content[start : start + 4096])) + content[start + 4096 :]


@pytest.mark.parametrize("damage", [cut, flip, zero])
def test_a_thousand_broken_files_hold_all_that_was_acknowledged_or_are_reported(
    folder, monkeypatch, damage
):
    """Each as a kill or a power cut during an append leaves the file, broken at a random byte."""
    monkeypatch.setattr(durable, "JOURNAL_BYTES_MIN", 10_000)
    monkeypatch.setattr(journal.os, "fsync", lambda _: None)  # what is read is what was written
    chance = random.Random(SEED)
    outcomes = {"reported": 0, "before": 0, "after": 0}

    async def main():
        window = await StateFolder(folder / "live").window("window.a", 40)
        path = folder / "live" / "windows" / "a.state"
        copy = folder / "broken" / "windows" / "a.state"
        StateFolder(folder / "broken")
        for number in range(1, 1001):
            if window._compacting is not None:
                await window._compacting
            before, rows_before = path.read_bytes(), times_of(window)
            times = [number * 10 + chance.randrange(-50, 10) for _ in range(chance.randrange(1, 8))]
            await put(window, *(max(1, time) for time in times))
            acknowledged, after = len(before), path.read_bytes()
            if not after.startswith(before[journal.FRAMES_AT :], journal.FRAMES_AT):
                after = before  # the file was written anew meanwhile; that step is not torn
            # The mark comes last: until then it is as it was before the append.
            crashed = before[: journal.FRAMES_AT] + after[journal.FRAMES_AT :]
            low = 0 if number % 2 or after is before else acknowledged
            place = chance.randrange(low, len(crashed) + (damage is cut))
            broken = damage(crashed, place)
            copy.write_bytes(broken)
            # Of what is before the frames a part says nothing, and the mark may be missing.
            harmless = broken == crashed or (place < journal.FRAMES_AT and damage is flip)
            try:
                found = times_of(await again(folder / "broken"))
            except StoreDamaged:
                assert broken[:acknowledged] != crashed[:acknowledged], "a torn end is no damage"
                outcomes["reported"] += 1
                continue
            untouched = broken[:acknowledged] == crashed[:acknowledged]
            assert untouched or harmless, "acknowledged rows went without a word"
            whole = harmless and after is not before
            assert found == (times_of(window) if whole else rows_before)
            outcomes["after" if whole else "before"] += 1

    run(main())
    assert sum(outcomes.values()) == 1000
    assert outcomes["reported"] > 0
    assert outcomes["before"] > 0


def test_a_damaged_window_is_reported_until_it_is_repaired(folder):
    async def main():
        window = await StateFolder(folder).window("window.a", 10)
        for time in (1, 2, 3):
            await put(window, time)
        path = folder / "windows" / "a.state"
        content = bytearray(path.read_bytes())
        second = content.index(np.int64(2).tobytes() + np.float64(2).tobytes())
        content[second] ^= 0xFF
        path.write_bytes(content)
        state = StateFolder(folder)
        for _ in range(2):
            with pytest.raises(StoreDamaged, match="a broken frame at byte"):
                await state.window("window.a", 10)
        assert path.read_bytes() == content
        report = await state.repair("window.a")
        assert "2 rows kept" in report
        window = await state.window("window.a", 10)
        assert times_of(window) == [1, 3]
        await put(window, 4)
        assert times_of(await again(folder)) == [1, 3, 4]
        (aside,) = path.parent.glob("*.damaged-*")
        assert aside.read_bytes() == content
        assert str(aside) in report
        assert await state.repair("window.a") == "it is not damaged"

    run(main())


def test_a_window_whose_state_is_broken_keeps_its_changes(folder):
    async def main():
        window = await StateFolder(folder).window("window.a", 10)
        await put(window, 1)
        path = folder / "windows" / "a.state"
        content = bytearray(path.read_bytes())
        content[journal.FRAMES_AT + 20] ^= 1
        path.write_bytes(content)
        state = StateFolder(folder)
        with pytest.raises(StoreDamaged):
            await state.window("window.a", 10)
        assert "1 rows kept" in await state.repair("window.a")
        assert times_of(await state.window("window.a", 10)) == [1]

    run(main())


def fail(number):
    def failing(*_arguments):
        raise OSError(number, os.strerror(number))

    return failing


def test_rows_that_find_no_room_are_refused_and_later_taken(folder, monkeypatch):
    async def main():
        window = await StateFolder(folder).window("window.a", 10)
        await put(window, 1)
        monkeypatch.setattr(journal.os, "pwrite", fail(errno.ENOSPC))
        with pytest.raises(StoreFull, match="window of a cannot be written: No space left"):
            await put(window, 2)
        assert times_of(window) == [1]
        monkeypatch.undo()
        assert times_of(await again(folder)) == [1]
        await put(window, 3)
        assert times_of(window) == times_of(await again(folder)) == [1, 3]

    run(main())


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_after_a_failed_sync_the_window_is_written_into_a_new_file(folder, monkeypatch, number):
    async def main():
        window = await StateFolder(folder).window("window.a", 10)
        await put(window, 1)
        path = folder / "windows" / "a.state"
        first = path.stat().st_ino
        monkeypatch.setattr(journal.os, "fdatasync", fail(number))
        with pytest.raises(StoreFull):
            await put(window, 2)
        monkeypatch.setattr(journal.os, "fsync", fail(number))
        with pytest.raises(StoreFull):
            await put(window, 2)
        assert times_of(window) == [1]
        monkeypatch.undo()
        await put(window, 3)
        assert path.stat().st_ino != first
        assert times_of(window) == times_of(await again(folder)) == [1, 3]

    run(main())


def test_a_window_that_cannot_be_written_anew_goes_on_in_its_file(folder, monkeypatch):
    monkeypatch.setattr(durable, "JOURNAL_BYTES_MIN", 1)
    monkeypatch.setattr(durable, "JOURNAL_FACTOR", 0)

    async def main():
        window = await StateFolder(folder).window("window.a", 10)
        monkeypatch.setattr(journal.os, "fsync", fail(errno.ENOSPC))
        for time in range(1, 6):
            await put(window, time)
            await window._compacting
        monkeypatch.undo()
        assert times_of(window) == times_of(await again(folder)) == [1, 2, 3, 4, 5]
        assert [file.name for file in (folder / "windows").iterdir()] == ["a.state"]

    run(main())


def test_a_slow_disk_does_not_fill_the_memory(folder, monkeypatch):
    monkeypatch.setattr(durable, "WAITING_BYTES_MAX", 10_000)
    go_on = threading.Event()
    sync = os.fdatasync

    def held(descriptor):
        assert go_on.wait(60)
        sync(descriptor)

    async def main():
        state = StateFolder(folder)
        windows = [await state.window(f"window.{node}", 10_000) for node in "ab"]
        monkeypatch.setattr(journal.os, "fdatasync", held)
        appends = [
            asyncio.create_task(
                put(windows[number % 2], *range(100 * number + 1, 100 * number + 101))
            )
            for number in range(20)
        ]
        done, waiting = await asyncio.wait(appends, timeout=0.2)
        assert len(waiting) == 6  # of 1,600 bytes each
        for each in done:
            with pytest.raises(StoreFull, match="9600 bytes wait for the disk; at most 10000 may"):
                await each
        go_on.set()
        await asyncio.gather(*waiting)
        await put(windows[0], 100_000)
        assert sum(len(times_of(window)) for window in windows) == 601

    run(main())


def test_rows_that_no_window_holds_never_reach_the_disk(folder):
    async def main():
        window = await StateFolder(folder).window("window.a", 10)
        size = (folder / "windows" / "a.state").stat().st_size
        with pytest.raises(InvalidRows):
            await put(window, -1)
        with pytest.raises(InvalidRows):
            await window.append([f"c{n}" for n in range(1001)], np.array([1]), np.ones((1, 1001)))
        assert (folder / "windows" / "a.state").stat().st_size == size

    run(main())


def test_two_appends_that_together_have_too_many_columns(folder):
    async def main():
        window = await StateFolder(folder).window("window.a", 10)
        outcomes = await asyncio.gather(
            *(
                window.append([f"{part}{n}" for n in range(600)], np.array([1]), np.ones((1, 600)))
                for part in "ab"
            ),
            return_exceptions=True,
        )
        assert isinstance(outcomes[1], InvalidRows)
        assert len(window.info().columns) == 600
        assert len((await again(folder)).info().columns) == 600

    run(main())


def test_a_window_without_a_file_is_not_made_by_a_reader(folder):
    async def main():
        with pytest.raises(KeyError):
            await StateFolder(folder).window("window.a", None)

    run(main())


def test_files_that_did_not_take_their_place_are_deleted(folder):
    StateFolder(folder)
    left = folder / "windows" / "a.state.7.new"
    left.write_bytes(b"half")
    assert StateFolder(folder).aliases() == []
    assert not left.exists()


def version(number):
    return ModelVersion(number, {"w": np.full(3, number, np.float32)}, {})


def test_a_model_that_finds_no_room_leaves_the_one_before(folder, monkeypatch):
    async def main():
        state = await StateFolder(folder).model_state("model.a.cpu")
        await state.put(version(1), True)
        monkeypatch.setattr(journal.os, "pwrite", fail(errno.ENOSPC))
        with pytest.raises(StoreFull, match="model state cannot be written: No space left"):
            await state.put(version(2), True)
        monkeypatch.undo()
        found = await StateFolder(folder).model_state("model.a.cpu")
        assert state.get("best").round == found.get("best").round == 1
        assert [file.name for file in (folder / "models").iterdir()] == ["a.cpu.state"]

    run(main())


def test_a_damaged_model_is_reported_until_the_next_takes_its_place(folder):
    async def main():
        state = await StateFolder(folder).model_state("model.a.cpu")
        await state.put(version(1), True)
        path = folder / "models" / "a.cpu.state"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        found = await StateFolder(folder).model_state("model.a.cpu")
        with pytest.raises(StoreUnavailable, match=r"a\.cpu\.state"):
            found.get("latest")
        await found.put(version(2), False)
        assert found.get("latest").round == 2
        assert found.get("best") is None
        (aside,) = path.parent.glob("*.damaged-*")
        assert aside.read_bytes() == content

    run(main())
