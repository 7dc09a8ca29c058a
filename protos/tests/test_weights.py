"""Models to one array and back; an array that is not what is said of it is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from icos_fl.federation.v1.weights import Flat, WeightsError, pack, unpack

TENSORS = st.dictionaries(
    st.text(max_size=8),
    arrays(np.float32, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)),
    max_size=4,
)
W = np.array([[1, 2], [3, 4]], np.float32)
B = np.array(5, np.float32)


@given(st.dictionaries(st.text(max_size=8), TENSORS, max_size=3))
def test_what_was_packed_is_unpacked_in_the_same_order(models):
    array, config = pack({metric: Flat.of(weights) for metric, weights in models.items()})
    found = {metric: flat.named() for metric, flat in unpack(array, config).items()}
    assert [list(weights) for weights in found.values()] == [list(w) for w in models.values()]
    assert list(found) == list(models)
    for metric, weights in models.items():
        for name, tensor in weights.items():
            np.testing.assert_array_equal(found[metric][name], tensor, strict=True)


def test_tensors_and_models_follow_each_other():
    array, config = pack({"m": Flat.of({"w": W, "b": B}), "n": Flat.of({"b": B})})
    assert array.dtype == np.float32
    assert array.tolist() == [1, 2, 3, 4, 5, 5]
    assert config == {
        "weights-metrics": ["m", "n"],
        "weights-layouts": ['[["w",[2,2]],["b",[]]]', '[["b",[]]]'],
    }


def test_what_is_unpacked_is_views():
    array, config = pack({"m": Flat.of({"w": W})})
    assert np.shares_memory(unpack(array, config)["m"].named()["w"], array)


def test_other_types_become_float32():
    assert Flat.of({"w": np.array([1, 2], np.int64)}).vector.dtype == np.float32


def test_tensors_are_arranged_by_name():
    given = Flat.of({"b": B, "w": W})
    arranged = given.arranged(Flat.of({"w": W, "b": B}).layout)
    assert arranged.vector.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"weights-metrics": ["m", "m"]}, "metric 'm' is in the array more than once"),
        ({"weights-metrics": ["m"]}, "2 layouts for 1 metrics"),
        ({"weights-metrics": "m"}, "weights-metrics is no list of strings"),
        (
            {"weights-layouts": ['[["w",[2,2]]]'] * 2},
            "the array has 5 numbers, its layouts have 8",
        ),
        ({"weights-layouts": ["[[", "[]"]}, "the layout of 'm' is none: '[['"),
        ({"weights-layouts": ["{}", "3"]}, "the layout of 'n' is none: '3'"),
        ({"weights-layouts": ['[["w",[2.5,2]]]', "[]"]}, "the layout of 'm' is none: "),
        ({"weights-layouts": ['[["w",[-5,-1]]]', "[]"]}, "the layout of 'm' is none: "),
        ({"weights-layouts": ['[[["w"],[5]]]', "[]"]}, "the layout of 'm' is none: "),
        ({"weights-layouts": [f'[["w",{[1] * 33}]]', "[]"]}, "the layout of 'm' is none: "),
        ({"weights-layouts": [f'[["w",[0,{2**31}]]]', "[]"]}, "the layout of 'm' is none: "),
        ({"weights-layouts": ['[["w",[0,65536,65536]]]', "[]"]}, "the layout of 'm' is none: "),
        ({"weights-layouts": ['[["w",[5]],["w",[0]]]', "[]"]}, "the layout of 'm' is none: "),
    ],
)
def test_a_message_that_contradicts_itself_is_refused(change, cause):
    array, config = pack({"m": Flat.of({"w": W}), "n": Flat.of({"b": B})})
    with pytest.raises(WeightsError) as caught:
        unpack(array, config | change)
    assert str(caught.value).startswith(cause)


@pytest.mark.parametrize("array", [W, W.ravel().astype(np.float64), np.array(list("abcd"))])
def test_an_array_of_another_type_or_shape_is_refused(array):
    _, config = pack({"m": Flat.of({"w": W})})
    with pytest.raises(WeightsError, match="it must be of type float32 and one-dimensional"):
        unpack(array, config)
