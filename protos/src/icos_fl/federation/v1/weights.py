"""The models of all metrics as one array, and back: the same code at the server and at the nodes.

A model is the tensors of its state_dict in order, flattened (C order), one after the other. The
models of a message follow each other in the order of METRICS_KEY in its ConfigRecord, and
LAYOUTS_KEY says for each of them which tensors it is made of.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

METRICS_KEY: Final = "weights-metrics"
"""In a message's ConfigRecord: which metrics have weights in the array, in which order."""

LAYOUTS_KEY: Final = "weights-layouts"
"""For each of these metrics the layout as JSON: ``[["head.weight", [20, 4]], …]``."""

LENGTH_MAX: Final = 2**31
DIMENSIONS_MAX: Final = 32
"""Of one tensor; numpy and torch have 64."""

Weights = dict[str, NDArray[np.float32]]
"""A model's tensors by name, in order."""

Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""Name and shape of every tensor of a model, in order."""


class WeightsError(ValueError):
    """An array that is not what its message says of it."""


@dataclass(frozen=True)
class Flat:
    """The weights of one model as a vector (numbers,) float32."""

    vector: NDArray[np.float32]
    layout: Layout

    @classmethod
    def of(cls, weights: Mapping[str, NDArray[Any]]) -> "Flat":
        """Copies *weights*, in their order."""
        layout = tuple((name, tuple(array.shape)) for name, array in weights.items())
        return cls(_joined(array.ravel() for array in weights.values()), layout)

    def named(self) -> Weights:
        """The tensors, as views."""
        shapes = dict(self.layout)
        parts = _parts(self.vector, map(math.prod, shapes.values()))
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def arranged(self, layout: Layout) -> "Flat":
        """The same tensors in the order of *layout*; itself where that is its own."""
        if layout == self.layout:
            return self
        named = self.named()
        return Flat.of({name: named[name] for name, _ in layout})


def pack(models: Mapping[str, Flat]) -> tuple[NDArray[np.float32], dict[str, list[str]]]:
    """One array of all *models*, by metric, and what the message's ConfigRecord says of it."""
    layouts = [json.dumps(model.layout, separators=(",", ":")) for model in models.values()]
    array = _joined(model.vector for model in models.values())
    return array, {METRICS_KEY: list(models), LAYOUTS_KEY: layouts}


def unpack(array: NDArray[Any], config: Mapping[str, object]) -> dict[str, Flat]:
    """What was packed, as views of *array*, by metric. Raises WeightsError."""
    metrics, texts = _strings(config, METRICS_KEY), _strings(config, LAYOUTS_KEY)
    if len(metrics) != len(texts):
        raise WeightsError(f"{len(texts)} layouts for {len(metrics)} metrics")
    for metric in metrics:
        if metrics.count(metric) > 1:
            raise WeightsError(f"metric {metric!r} is in the array more than once")
    if array.dtype != np.float32 or array.ndim != 1:
        raise WeightsError(
            f"the array is of type {array.dtype} and shape {array.shape}, "
            "it must be of type float32 and one-dimensional"
        )
    layouts = [_layout(metric, text) for metric, text in zip(metrics, texts, strict=True)]
    sizes = [sum(math.prod(shape) for _, shape in layout) for layout in layouts]
    if len(array) != sum(sizes):
        raise WeightsError(f"the array has {len(array)} numbers, its layouts have {sum(sizes)}")
    parts = _parts(array, sizes)
    return {
        metric: Flat(part, layout)
        for metric, part, layout in zip(metrics, parts, layouts, strict=True)
    }


def _joined(vectors: Iterable[NDArray[Any]]) -> NDArray[np.float32]:
    # The empty one first: a message without a model, and a model without a tensor, are no errors.
    return np.concatenate([np.empty(0, np.float32), *vectors], dtype=np.float32)


def _parts(vector: NDArray[np.float32], sizes: Iterable[int]) -> Iterable[NDArray[np.float32]]:
    start = 0
    for size in sizes:
        yield vector[start : start + size]
        start += size


def _strings(config: Mapping[str, object], key: str) -> list[str]:
    value = config.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise WeightsError(f"{key} is no list of strings")
    return value


def _layout(metric: str, text: str) -> Layout:
    try:
        pairs = [(name, tuple(shape)) for name, shape in json.loads(text)]
    except (ValueError, TypeError, RecursionError):
        pairs = [("", (-1,))]
    names = [name for name, _ in pairs if isinstance(name, str)]
    if len(set(names)) < len(pairs) or not all(_is_shape(shape) for _, shape in pairs):
        raise WeightsError(f"the layout of {metric!r} is none: {text[:100]!r}")
    return tuple(pairs)


def _is_shape(shape: tuple[object, ...]) -> bool:
    lengths = [n for n in shape if isinstance(n, int) and 0 <= n < LENGTH_MAX]
    # Of a tensor without numbers too: numpy refuses a shape whose other lengths overflow.
    known = math.prod(n for n in lengths if n) < LENGTH_MAX
    return known and len(lengths) == len(shape) <= DIMENSIONS_MAX
