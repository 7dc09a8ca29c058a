"""The processor as a library, without gRPC."""

import numpy as np
import pytest
from icos_fl_processor import (
    Part,
    Processor,
    SeriesSpec,
    TooFewRows,
    UnknownColumn,
    denormalise,
    sliding_windows,
)
from icos_fl_processor.windows import Normalisation
from icos_fl_timeseries_store import UnknownNode


def spec(**changes) -> SeriesSpec:
    facts = {
        "node": "a",
        "features": ("power",),
        "targets": ("power",),
        "lookback": 3,
        "horizon": 2,
    }
    return SeriesSpec(**(facts | changes))


def test_sequences_return_to_units(store):
    store.fill("a", {"power": [3, 1, 4, 1, 5, 9, 2, 6]})
    found = Processor(store).sequences(spec())
    (power,) = found.columns
    (chunk,) = found.chunks
    inputs, targets = sliding_windows(chunk.rows_sf, 3, 2)
    by = Normalisation(np.array([power.mean]), np.array([power.standard_deviation]))
    assert denormalise(inputs[0], by).ravel() == pytest.approx([3, 1, 4], rel=1e-6)
    assert denormalise(targets[-1], by).ravel() == pytest.approx([2, 6], rel=1e-6)


def test_chunks_can_be_had_again(store):
    store.fill("a", {"power": list(range(10))})
    found = Processor(store).sequences(spec(train_fraction=0.5))
    assert [chunk.part for chunk in found.chunks] == [Part.TRAIN, Part.VALIDATION]
    assert [chunk.part for chunk in found.chunks] == [Part.TRAIN, Part.VALIDATION]


def test_no_chunk_is_larger_than_a_message(store):
    store.fill("a", {"power": list(range(60_000))})
    found = Processor(store, message_bytes_max=64 << 10).sequences(spec(train_fraction=0.5))
    sizes = [chunk.rows_sf.nbytes for chunk in found.chunks]
    assert len(sizes) > 2
    assert max(sizes) <= 64 << 10


def test_errors_are_of_the_domain(store):
    store.fill("a", {"power": [1, 2]})
    processor = Processor(store)
    with pytest.raises(UnknownNode):
        processor.latest(spec(node="b"))
    with pytest.raises(UnknownColumn):
        processor.latest(spec(features=("cpu",)))
    with pytest.raises(TooFewRows, match="has 2 steps; the lookback needs 3"):
        processor.latest(spec())


def test_a_watch_ends_when_told(store):
    store.fill("a", {"power": [1, 2]})
    ended = iter([False, True])
    changes = list(Processor(store).watch("a", lambda: next(ended)))
    assert [change.changed_rows for change in changes] == [2]
