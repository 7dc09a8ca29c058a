"""An OTLP metrics request in JSON, of which only the wanted metrics become messages.

OTLP's JSON is protobuf's with exceptions: ids are hexadecimal (only exemplars have ids, and no row
needs an exemplar), and keys are lowerCamelCase alone.
"""

import json
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.message import Message
from msgspec import Raw, Struct
from msgspec.json import Decoder
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from icos_fl_otlp_bridge.errors import Undecodable
from icos_fl_otlp_bridge.memory import BYTE_BYTES_MAX, check_decoded

# What values take, by the byte that tells of one.
_SKIMMED_BYTES: Final = {b"{": 128}
_SKIMMED_COPIES: Final = 2
_OPENED_BYTES: Final = {b"{": 256, b"[": 96, b",": 64}
_COPIES: Final = {True: 3, False: 10}
"""Of a byte of text that is ASCII, or not: one character of four bytes makes all others as wide."""
_REASON_CHARACTERS: Final = 300


class _Skimmed(Struct, rename="camel", gc=False):
    """What has no name here is passed over; what is Raw stays as it is in the text."""


class _Metric(_Skimmed):
    name: str | None = ""
    gauge: Raw = Raw()
    sum: Raw = Raw()
    histogram: Raw = Raw()
    exponential_histogram: Raw = Raw()
    summary: Raw = Raw()


class _ScopeMetrics(_Skimmed):
    scope: Raw = Raw()
    metrics: list[Raw] | None = None
    """Each is looked into by itself: a metric that is told apart takes five times as much."""


class _ResourceMetrics(_Skimmed):
    resource: Raw = Raw()
    scope_metrics: list[_ScopeMetrics] | None = None


class _Request(_Skimmed):
    resource_metrics: list[_ResourceMetrics] | None = None


_REQUEST: Final = Decoder(_Request)
_METRIC: Final = Decoder(_Metric)
_KINDS: Final = ("gauge", "sum", "histogram", "exponential_histogram", "summary")


def decoded_bytes(text: bytes, _: frozenset[str]) -> int:
    """An upper estimate of what ``parse``, and all that is made of it, takes."""
    return BYTE_BYTES_MAX * len(text)


def parse(text: bytes, wanted: frozenset[str]) -> ExportMetricsServiceRequest:
    """The request as if it had only the *wanted* metrics, without exemplars and schemas.

    What belongs to none of them is only seen to be JSON. Raises Undecodable, TooLarge.
    """
    try:
        return _parsed(text, wanted)
    # The last two: what json_format raises for values that it did not think of.
    except (json_format.ParseError, ValueError, RecursionError, TypeError, AttributeError) as error:
        reason = str(error)[:_REASON_CHARACTERS]
        raise Undecodable(
            f"the request's {len(text)} bytes are no ExportMetricsServiceRequest in JSON: {reason}"
        ) from None


def _parsed(text: bytes, wanted: frozenset[str]) -> ExportMetricsServiceRequest:
    opening = _Opening(text)
    request = ExportMetricsServiceRequest()
    for of_resource in _REQUEST.decode(text).resource_metrics or ():
        resource_metrics = request.resource_metrics.add()
        opening.fill(resource_metrics, of_resource, "resource")
        for of_scope in of_resource.scope_metrics or ():
            scope_metrics = resource_metrics.scope_metrics.add()
            opening.fill(scope_metrics, of_scope, "scope")
            for metric in map(_METRIC.decode, of_scope.metrics or ()):
                if metric.name in wanted:
                    opening.fill(scope_metrics.metrics.add(name=metric.name), metric, *_KINDS)
    return request


class _Opening:
    """Makes messages of Raw values, as long as a request takes no more than it may."""

    def __init__(self, text: bytes) -> None:
        self._text_bytes = len(text)
        self._taken = _estimate(text, _SKIMMED_BYTES) + _SKIMMED_COPIES * len(text)
        check_decoded(self._text_bytes, self._taken)

    def fill(self, message: Message, skimmed: _Skimmed, *names: str) -> None:
        """The *message*'s fields of these names, from those of *skimmed*."""
        document = {}
        for name in names:
            text = bytes(getattr(skimmed, name))
            if text:
                self._taken += _estimate(text, _OPENED_BYTES) + _COPIES[text.isascii()] * len(text)
                check_decoded(self._text_bytes, self._taken)
                document[name] = _without_strangers(json.loads(text.decode()))
        json_format.ParseDict(document, message, ignore_unknown_fields=True)


def _estimate(text: bytes, bytes_of: dict[bytes, int]) -> int:
    return sum(taken * text.count(sign) for sign, taken in bytes_of.items())


def _without_strangers(value: Any) -> Any:
    """*value*, rid of exemplars, and of keys as protobuf writes them (``time_unix_nano``)."""
    if isinstance(value, dict):
        for key in [key for key in value if key == "exemplars" or "_" in key]:
            del value[key]
        for child in value.values():
            _without_strangers(child)
    elif isinstance(value, list):
        for child in value:
            _without_strangers(child)
    return value
