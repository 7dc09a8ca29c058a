"""What of a window's steps a client that kept an earlier answer has already."""

import itertools
from dataclasses import dataclass

import numpy as np

from icos_fl_processor.windows import Steps, Values

PIECES_MAX = 256
"""More pieces than this cost more than the steps that they spare: then all steps are new."""


@dataclass(frozen=True)
class Piece:
    """Consecutive steps that the client kept, or new ones; as ``StepsPiece`` in the proto."""

    kept_first: int
    kept_steps: int
    """0 where the steps are new."""
    values_sf: Values
    """Without a step where they are kept; a view that must not be written."""


def pieces(kept: Steps | None, now: Steps) -> list[Piece]:
    """The steps of *now*, in order, by reference to those of *kept* where their values are equal.

    Only values count. Times pair the steps, as the grid moves with the newest row; a wrong pair
    would cost a step sent again, never a wrong value.
    """
    if not len(now):
        return []
    if kept is None or not len(kept):
        return [_new(now, 0, len(now))]
    return _slid(kept, now) or _paired(kept, now)


def _slid(kept: Steps, now: Steps) -> list[Piece]:
    """Where *kept* only lost its oldest steps and got newer ones; else nothing.

    This is what a window does nearly always, and seen without pairing steps.
    """
    first = int(np.searchsorted(kept.times_ns_s, now.times_ns_s[0] - now.interval_ns // 2))
    count = len(kept) - first
    if not 0 < count <= len(now) or (kept.values_sf[first:] != now.values_sf[:count]).any():
        return []
    rest = [_new(now, count, len(now))] if count < len(now) else []
    return [_same(first, count, now), *rest]


def _paired(kept: Steps, now: Steps) -> list[Piece]:
    place_s = np.searchsorted(kept.times_ns_s, now.times_ns_s - now.interval_ns // 2)
    place_s = np.minimum(place_s, len(kept) - 1)
    same_s = (kept.values_sf[place_s] == now.values_sf).all(axis=1)
    follows_s = same_s[1:] & same_s[:-1] & (np.diff(place_s) == 1)
    begins_s = ~(follows_s | (~same_s[1:] & ~same_s[:-1]))
    bounds = [0, *(np.flatnonzero(begins_s) + 1).tolist(), len(now)]
    if len(bounds) - 1 > PIECES_MAX:
        return [_new(now, 0, len(now))]
    return [
        _same(int(place_s[first]), stop - first, now) if same_s[first] else _new(now, first, stop)
        for first, stop in itertools.pairwise(bounds)
    ]


def _same(kept_first: int, count: int, now: Steps) -> Piece:
    return Piece(kept_first, count, now.values_sf[:0])


def _new(now: Steps, first: int, stop: int) -> Piece:
    return Piece(0, 0, now.values_sf[first:stop])
