"""An OTLP metrics request in protobuf, of which only the wanted metrics become messages.

Nearly all of a Scaphandre's batch is series of single processes, which no column names: parsing
them would cost several times what is done with the others.
"""

from collections.abc import Iterator
from functools import cache
from typing import Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from icos_fl_otlp_bridge.errors import Undecodable
from icos_fl_otlp_bridge.memory import BYTE_BYTES_MAX, DECODED_BYTES_MAX, SMALL_BYTES, check_decoded

# What decoding takes, and all that is made of it, is estimated before: a request of 64 MiB may hold
# 32 million empty points.
_POINT_BYTES: Final = 512
_MESSAGE_BYTES: Final = 160
_COPIES: Final = 6
"""Of a byte of text or of numbers: one character of four bytes makes all others as wide."""
_PACKED_COPIES: Final = 64
"""Of a byte of packed integers, each of which may be that short."""

_NESTED_MAX: Final = 100
"""Messages within messages, as protobuf has it."""
_VARINT: Final = 0
_LENGTH: Final = 2
_FIXED_BYTES: Final = {1: 8, 5: 4}


# The parts of a request. No Enum, whose members are looked up too slowly for each metric.
_RESOURCE_METRICS, _RESOURCE, _SCOPE_METRICS, _SCOPE, _METRIC, _OTHER_METRIC = range(6)
_MESSAGES: Final[dict[int, Descriptor]] = {
    _RESOURCE: Resource.DESCRIPTOR,
    _SCOPE: InstrumentationScope.DESCRIPTOR,
    _METRIC: Metric.DESCRIPTOR,
}


def parse(serialized: bytes, wanted: frozenset[str]) -> ExportMetricsServiceRequest:
    """The request as if it had only the *wanted* metrics, and no schema. Raises Undecodable.

    A metric that is not wanted is not looked into: that it could not be parsed stays unnoticed.
    """
    request = ExportMetricsServiceRequest()
    try:
        for part, start, end in _parts(serialized, wanted):
            if part == _RESOURCE_METRICS:
                resource_metrics = request.resource_metrics.add()
            elif part == _RESOURCE:
                resource_metrics.resource.MergeFromString(serialized[start:end])
            elif part == _SCOPE_METRICS:
                scope_metrics = resource_metrics.scope_metrics.add()
            elif part == _SCOPE:
                scope_metrics.scope.MergeFromString(serialized[start:end])
            elif part == _METRIC:
                scope_metrics.metrics.add().MergeFromString(serialized[start:end])
    except (DecodeError, IndexError):
        raise _undecodable(serialized) from None
    return request


def decoded_bytes(serialized: bytes, wanted: frozenset[str]) -> int:
    """An upper estimate of what ``parse``, and all that is made of it, takes. Takes little itself.

    Raises Undecodable, TooLarge.
    """
    if BYTE_BYTES_MAX * len(serialized) <= SMALL_BYTES:
        return BYTE_BYTES_MAX * len(serialized)
    total = 0
    try:
        for estimate, enough in (_roughly, SMALL_BYTES), (_estimate, DECODED_BYTES_MAX):
            total = 0
            for part, start, end in _parts(serialized, wanted):
                total += _MESSAGE_BYTES
                if part in _MESSAGES:
                    total += estimate(serialized, start, end, _MESSAGES[part])
                if total > enough:
                    break
            else:
                break
    except (DecodeError, IndexError):
        raise _undecodable(serialized) from None
    check_decoded(len(serialized), total)
    return total


def _undecodable(serialized: bytes) -> Undecodable:
    return Undecodable(f"the request's {len(serialized)} bytes are no ExportMetricsServiceRequest")


def _roughly(_: bytes, start: int, end: int, __: Descriptor) -> int:
    return BYTE_BYTES_MAX * (end - start)


def _estimate(data: bytes, start: int, end: int, descriptor: Descriptor, nested: int = 0) -> int:
    """Of the fields of a message; no further than it is too much."""
    if nested > _NESTED_MAX:
        raise DecodeError
    total = 0
    costs = _costs(descriptor)
    for number, first, behind in _fields(data, start, end):
        cost, message = costs.get(number, (0, None))
        if message is None:
            total += cost * (behind - first)
        else:
            total += cost
            if first < behind:
                total += _estimate(data, first, behind, message, nested + 1)
        if total > DECODED_BYTES_MAX:
            break
    return total


@cache
def _costs(descriptor: Descriptor) -> dict[int, tuple[int, Descriptor | None]]:
    """By a field's number: what a byte of it takes, or a message, and of which type that is."""
    costs = {}
    for field in descriptor.fields:
        message = field.message_type
        if message is None:
            cost = _PACKED_COPIES if field.type == FieldDescriptor.TYPE_UINT64 else _COPIES
        elif not field.is_repeated:
            cost = 0  # its message has it at most once
        else:
            is_point = "time_unix_nano" in message.fields_by_name
            cost = _POINT_BYTES if is_point else _MESSAGE_BYTES
        costs[field.number] = cost, message
    return costs


def _parts(data: bytes, wanted: frozenset[str]) -> Iterator[tuple[int, int, int]]:
    """Where the parts of a request are, each before those within it. Raises as ``_fields``."""
    names = {name.encode(errors="surrogatepass") for name in wanted}
    for in_request, start, end in _fields(data, 0, len(data)):
        if in_request != 1:
            continue
        yield _RESOURCE_METRICS, start, end
        for in_resource, first, behind in _fields(data, start, end):
            if in_resource == 1:
                yield _RESOURCE, first, behind
            elif in_resource == 2:
                yield _SCOPE_METRICS, first, behind
                for in_scope, a, b in _fields(data, first, behind):
                    if in_scope == 2:
                        named = _name_of(data, a, b) in names
                        yield _METRIC if named else _OTHER_METRIC, a, b
                    elif in_scope == 1:
                        yield _SCOPE, a, b


def _name_of(data: bytes, start: int, end: int) -> bytes:
    """The name of a serialized Metric. Encoders begin with it, as it is the first field."""
    if end - start > 1 and data[start] == 0x0A and data[start + 1] < 0x80:
        return data[start + 2 : min(start + 2 + data[start + 1], end)]
    return next((data[a:b] for number, a, b in _fields(data, start, end) if number == 1), b"")


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field that has a length; the others are passed over.

    Raises DecodeError or IndexError of what is no message. A group, which OTLP has not, is none.
    """
    while start < end:
        tag = data[start]
        start += 1
        if tag > 0x7F:
            tag, start = _varint(data, start - 1)
        kind = tag & 7
        if kind == _LENGTH:
            length = data[start]
            start += 1
            if length > 0x7F:
                if data[start] > 0x7F:
                    length, start = _varint(data, start - 1)
                else:
                    length += (data[start] << 7) - 0x80
                    start += 1
            start += length
            if start > end or tag < 8:
                raise DecodeError
            yield tag >> 3, start - length, start
        elif kind == _VARINT:
            _, start = _varint(data, start)
        elif kind in _FIXED_BYTES:
            start += _FIXED_BYTES[kind]
        else:
            raise DecodeError
    if start > end:
        raise DecodeError


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """The number that begins at *start*, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
    raise DecodeError
