"""The steps of now by reference to those that were kept."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from icos_fl_processor.increments import PIECES_MAX, Piece, pieces
from icos_fl_processor.windows import Steps


def steps(values: dict[int, float]) -> Steps:
    """A step of 10 ns for each number, with the value."""
    numbers_s = np.array(sorted(values), np.int64)
    values_sf = np.array([[values[n]] for n in sorted(values)])
    starts_r = np.flatnonzero(np.diff(numbers_s, prepend=-2) != 1)
    return Steps(10, 10, numbers_s * 10 + 1_000, values_sf, starts_r)


def joined(kept: Steps, found: list[Piece]) -> list[float]:
    """What a client makes of the pieces."""
    return [
        value
        for piece in found
        for value in (
            kept.values_sf[piece.kept_first : piece.kept_first + piece.kept_steps]
            if piece.kept_steps
            else piece.values_sf
        )[:, 0].tolist()
    ]


def facts(found: list[Piece]) -> list[tuple[int, int, list[float]]]:
    return [(p.kept_first, p.kept_steps, p.values_sf[:, 0].tolist()) for p in found]


def test_nothing_kept_makes_all_steps_new():
    assert facts(pieces(None, steps({1: 5.0, 2: 6.0}))) == [(0, 0, [5.0, 6.0])]


def test_a_window_that_slides_is_a_kept_piece_and_a_new_one():
    kept = steps({1: 5.0, 2: 6.0, 3: 7.0})
    now = steps({2: 6.0, 3: 7.0, 4: 8.0})

    assert facts(pieces(kept, now)) == [(1, 2, []), (0, 0, [8.0])]


def test_a_changed_step_parts_kept_ones():
    kept = steps({1: 5.0, 2: 6.0, 3: 7.0})
    now = steps({1: 5.0, 2: 9.0, 3: 7.0})

    assert facts(pieces(kept, now)) == [(0, 1, []), (0, 0, [9.0]), (2, 1, [])]


def test_a_step_that_is_gone_parts_kept_ones():
    kept = steps({1: 5.0, 2: 6.0, 3: 7.0})
    now = steps({1: 5.0, 3: 7.0})

    assert facts(pieces(kept, now)) == [(0, 1, []), (2, 1, [])]


def test_many_pieces_are_sent_as_new_steps():
    kept = steps(dict.fromkeys(range(2 * PIECES_MAX), 1.0))
    now = steps({n: float(n % 2) for n in range(2 * PIECES_MAX)})

    (only,) = pieces(kept, now)
    assert len(only.values_sf) == 2 * PIECES_MAX


windows = st.dictionaries(st.integers(0, 30), st.sampled_from([1.0, 2.0]), min_size=1)


@given(kept=windows, now=windows)
def test_pieces_make_the_steps_of_now(kept, now):
    before, after = steps(kept), steps(now)

    assert joined(before, pieces(before, after)) == after.values_sf[:, 0].tolist()
