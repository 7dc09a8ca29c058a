"""Sends a recorded trace to the bridge of its node, again and again, over mutual TLS.

``replay.py NODE SECONDS``: all of it at once, then a row each SECONDS, with the times going on
after the trace's last. /tmp/acknowledged has how many rows the bridge has said OK to: a row is sent
when the one before is acknowledged.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
from icos_fl_local import replay, traces
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub

BRIDGE = "otlp-bridge:4317"
TRACES = Path("/opt/trace")
SECRETS = Path("/run/secrets")
ACKNOWLEDGED = Path("/tmp/acknowledged")  # noqa: S108 - of a container alone


def main() -> None:
    """Until it is stopped."""
    node, interval_seconds = sys.argv[1], float(sys.argv[2])
    (trace,) = traces.load(TRACES)
    trace, rows = replace(trace, node=node), len(trace.times_s)
    credentials = grpc.ssl_channel_credentials(
        *((SECRETS / name).read_bytes() for name in ("ca.pem", "collector.key", "collector.pem"))
    )
    with grpc.secure_channel(BRIDGE, credentials) as channel:
        stub = MetricsServiceStub(channel)
        for first, stop in batches(rows):
            lap, start = divmod(first, rows)
            answer = replay.export(
                stub, replay.request(later(trace, lap), start, start + stop - first)
            )
            if answer.partial_success.rejected_data_points:
                raise SystemExit(f"{BRIDGE}: {answer.partial_success.error_message}")
            ACKNOWLEDGED.write_text(f"{stop}\n")
            time.sleep(interval_seconds if stop > rows else 0)


def batches(rows: int) -> Iterator[tuple[int, int]]:
    """First and stop, in rows that are counted on from lap to lap."""
    for first in range(0, rows, replay.ROWS_PER_REQUEST):
        yield first, min(first + replay.ROWS_PER_REQUEST, rows)
    for first in itertools.count(rows):
        yield first, first + 1


def later(trace: traces.Trace, laps: int) -> traces.Trace:
    """*trace* with its times after those of *laps* before it."""
    span = int(trace.times_s[-1] - trace.times_s[0] + trace.interval_seconds)
    return replace(trace, times_s=trace.times_s + laps * span)


if __name__ == "__main__":
    main()
