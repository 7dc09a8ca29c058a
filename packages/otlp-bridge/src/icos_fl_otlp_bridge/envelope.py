"""An OTLP metrics request in which each metric stays bytes until its name is wanted.

Nearly all of a Scaphandre's batch is series of single processes, which no column names: parsing
them would cost several times what is done with the others.
"""

from collections.abc import Sequence
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.resource.v1 import resource_pb2

from icos_fl_otlp_bridge.errors import TooLarge, Undecodable

PARTS_MAX: Final = 1_000_000
"""Resources, scopes and metrics of a request."""

_PACKAGE: Final = "icos_fl.otlp_bridge.envelope"
_SCOPE: Final = common_pb2.InstrumentationScope.DESCRIPTOR.full_name
_RESOURCE: Final = resource_pb2.Resource.DESCRIPTOR.full_name
# Names and numbers of OTLP's fields, and the messages that they hold; None is plain bytes.
_MESSAGES: Final[dict[str, list[tuple[str, int, bool, str | None]]]] = {
    "ScopeMetrics": [
        ("scope", 1, False, _SCOPE),
        ("metrics", 2, True, None),
        ("schema_url", 3, False, None),
    ],
    "ResourceMetrics": [
        ("resource", 1, False, _RESOURCE),
        ("scope_metrics", 2, True, None),
        ("schema_url", 3, False, None),
    ],
    "Request": [("resource_metrics", 1, True, None)],
}


def _classes() -> tuple[Any, ...]:
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="icos_fl/otlp_bridge/envelope.proto",
        package=_PACKAGE,
        syntax="proto3",
        dependency=[common_pb2.DESCRIPTOR.name, resource_pb2.DESCRIPTOR.name],
    )
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, number, repeated, holds in fields:
            message.field.add(
                name=name,
                number=number,
                label=field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL,
                type=field_type.TYPE_MESSAGE if holds else field_type.TYPE_BYTES,
                type_name=f".{holds}" if holds else None,
            )
    descriptor_pool.Default().Add(file)
    find = descriptor_pool.Default().FindMessageTypeByName
    return tuple(message_factory.GetMessageClass(find(f"{_PACKAGE}.{name}")) for name in _MESSAGES)


_ScopeMetrics, _ResourceMetrics, _Request = _classes()


def parse(serialized: bytes, wanted: frozenset[str]) -> ExportMetricsServiceRequest:
    """The request as if it had only the *wanted* metrics. Raises Undecodable, TooLarge.

    A metric that is not wanted is not looked into: that it could not be parsed stays unnoticed.
    """
    try:
        return _parsed(serialized, wanted)
    except (DecodeError, UnicodeDecodeError):  # the latter of a schema_url
        raise Undecodable(
            f"the request's {len(serialized)} bytes are no ExportMetricsServiceRequest"
        ) from None


def _parsed(serialized: bytes, wanted: frozenset[str]) -> ExportMetricsServiceRequest:
    names = {name.encode(errors="surrogatepass") for name in wanted}
    request = ExportMetricsServiceRequest()
    parts = _Parts()
    for resource_bytes in parts.counted(_Request.FromString(serialized).resource_metrics):
        enveloped = _ResourceMetrics.FromString(resource_bytes)
        resource_metrics = request.resource_metrics.add(schema_url=enveloped.schema_url)
        if enveloped.HasField("resource"):
            resource_metrics.resource.CopyFrom(enveloped.resource)
        for scope_bytes in parts.counted(enveloped.scope_metrics):
            enveloped_scope = _ScopeMetrics.FromString(scope_bytes)
            scope_metrics = resource_metrics.scope_metrics.add(
                schema_url=enveloped_scope.schema_url
            )
            if enveloped_scope.HasField("scope"):
                scope_metrics.scope.CopyFrom(enveloped_scope.scope)
            for metric in parts.counted(enveloped_scope.metrics):
                if _name_of(metric) in names:
                    scope_metrics.metrics.add().MergeFromString(metric)
    return request


class _Parts:
    """Counts resources, scopes and metrics: an empty one is 2 bytes long, and costs a hundred."""

    def __init__(self) -> None:
        self._count = 0

    def counted(self, parts: Sequence[bytes]) -> Sequence[bytes]:
        self._count += len(parts)
        if self._count > PARTS_MAX:
            raise TooLarge(
                f"the request has {self._count} or more resources, scopes and metrics, over the "
                f"limit of {PARTS_MAX}"
            )
        return parts


def _name_of(metric: bytes) -> bytes:
    """The name of a serialized Metric.

    Encoders begin with the name, as it is the first field: tag, length, then its bytes. Whatever
    begins otherwise is parsed.
    """
    if len(metric) > 1 and metric[0] == 0x0A and metric[1] < 0x80:
        return metric[2 : 2 + metric[1]]
    return Metric.FromString(metric).name.encode()
