"""Which rows of which trace a virtual node has."""

from collections.abc import Sequence
from dataclasses import replace

from icos_fl_local.traces import Trace


def virtual_nodes(traces: Sequence[Trace], nodes: int) -> list[Trace]:
    """The traces of *nodes* virtual nodes, as views.

    As many traces as nodes, or more: the first ones as they are. More nodes than traces: node i
    takes half of trace i mod n, from a row of its own where the trace is long enough, and is named
    ``<trace>-<number>``. The halves of a trace begin at even distances, from its first to its last.
    """
    if nodes <= len(traces):
        return list(traces[:nodes])
    return [_part(traces[node % len(traces)], node, nodes, len(traces)) for node in range(nodes)]


def _part(trace: Trace, node: int, nodes: int, traces: int) -> Trace:
    number, trace_index = divmod(node, traces)
    sharers = len(range(trace_index, nodes, traces))
    total = len(trace.times_s)
    rows = (total + 1) // 2
    start = number * (total - rows) // max(1, sharers - 1)
    width = len(str(nodes // traces + 1))
    return replace(
        trace,
        node=f"{trace.node}-{number + 1:0{width}d}",
        times_s=trace.times_s[start : start + rows],
        values_tf=trace.values_tf[start : start + rows],
    )
