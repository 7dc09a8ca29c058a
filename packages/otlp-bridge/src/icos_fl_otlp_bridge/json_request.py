"""An OTLP metrics request in JSON, of which only the wanted metrics become messages.

OTLP's JSON is protobuf's with exceptions: ids are hexadecimal (only exemplars have ids, and no row
needs an exemplar), and keys are lowerCamelCase alone.
"""

import json
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from google.protobuf import json_format
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from icos_fl_otlp_bridge.errors import Undecodable

_KINDS: Final = ("gauge", "sum", "histogram", "exponentialHistogram", "summary")
_REASON_CHARACTERS: Final = 300


def parse(text: bytes, wanted: frozenset[str]) -> ExportMetricsServiceRequest:
    """The request as if it had only the *wanted* metrics, without exemplars. Raises Undecodable."""
    request = ExportMetricsServiceRequest()
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
        for scope in _objects(_objects([document], "resourceMetrics"), "scopeMetrics"):
            metrics = [metric for metric in _objects([scope], "metrics") if _name(metric) in wanted]
            scope["metrics"] = metrics
            for kind in _KINDS:
                data = (metric[kind] for metric in metrics if isinstance(metric.get(kind), dict))
                for point in _objects(data, "dataPoints"):
                    point.pop("exemplars", None)
        json_format.ParseDict(_camel(document), request, ignore_unknown_fields=True)
    # The last four: what json_format raises for values that it did not think of.
    except (json_format.ParseError, ValueError, RecursionError, TypeError, AttributeError) as error:
        reason = str(error)[:_REASON_CHARACTERS]
        raise Undecodable(
            f"the request's {len(text)} bytes are no ExportMetricsServiceRequest in JSON: {reason}"
        ) from None
    return request


def _objects(parents: Any, key: str) -> Iterator[dict[str, Any]]:
    """The objects in the lists that the *parents* have under *key*."""
    for parent in parents:
        if not isinstance(parent, dict):
            raise ValueError(f"an object is needed; read: {str(parent)[:40]!r}")
        children = parent.get(key)
        if children is None:
            continue
        if not isinstance(children, list):
            raise ValueError(f"{key}: a list is needed; read: {str(children)[:40]!r}")
        for child in children:
            if not isinstance(child, dict):
                raise ValueError(f"{key}: an object is needed; read: {str(child)[:40]!r}")
            yield child


def _name(metric: dict[str, Any]) -> str:
    name = metric.get("name")
    return name if isinstance(name, str) else ""


def _camel(value: Any) -> Any:
    """*value* without keys such as ``time_unix_nano``: protobuf's JSON knows them, OTLP's not."""
    if isinstance(value, dict):
        return {key: _camel(child) for key, child in value.items() if "_" not in key}
    if isinstance(value, list):
        return [_camel(child) for child in value]
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON; write it in quotes")
