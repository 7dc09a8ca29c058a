"""Sequences a second over the processor's gRPC, against bare streams and a per-item dataset.

    uv run python benchmarks/sequences.py [--json]

The server is a process of its own with a window of 100,000 rows in memory. Measured, each as the
median of turns that the ways take:

processor   GetSequences, its chunks turned into sliding views, window and series unchanged
refreshed   the same, after a new row made the processor read, resample and normalise all anew
batches     the first, and every sequence copied into batches of 64
bare        the same bytes over a bare gRPC stream from the same process
windows     the bytes of the materialised windows over a bare gRPC stream
per item    a PyTorch Dataset that cuts one sequence an item, in a DataLoader; no gRPC at all

And what a round of a node costs that keeps its steps, after one new row in a window of 300 and of
100,000 rows: seconds and bytes received of the client's ``sequences`` with a folder of kept steps
(read, joined, normalised and written again), against the same with none, in turns. No target: both
wait for the processor, which resamples the window anew for the new row.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np
import torch
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc
from icos_fl_client.kept import KeptSteps
from icos_fl_client.processor_client import ProcessorClient, Query
from icos_fl_processor import sliding_windows
from icos_fl_processor.server import Server
from icos_fl_service import logs
from icos_fl_timeseries_store import MemoryStore
from torch.utils.data import DataLoader, Dataset

ROWS = 100_000
NODES = {"a": ROWS, "small": 300}
COLUMNS = ("power_consumption", "cpu_usage", "memory_usage")
LOOKBACK, HORIZON = 60, 20
BATCH = 64
PER_ITEM_SEQUENCES = 10_000
MESSAGE_BYTES = 1 << 20
STEP_NS = 15_000_000_000
START_NS = 1_700_000_000_000_000_000
FAST_TURNS, SLOW_TURNS, WARM_UP = 60, 7, 2
KEPT_TURNS = 30
TARGET_OF_BARE, TARGET_OF_PER_ITEM = 0.5, 50.0


def values() -> np.ndarray:
    return np.random.default_rng(0).normal(50, 10, (ROWS, len(COLUMNS)))


class BareStreams(grpc.GenericRpcHandler):
    """``/bare/rows`` and ``/bare/windows``: ready-made messages, neither read nor parsed."""

    def __init__(self) -> None:
        rows = values().astype("<f4")
        inputs, targets = sliding_windows(rows, LOOKBACK, HORIZON)
        self._payloads = {
            "/bare/rows": rows.tobytes(),
            "/bare/windows": np.concatenate([inputs, targets], axis=1).tobytes(),
        }

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        payload = memoryview(self._payloads.get(details.method, b""))

        def stream(_request: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
            for start in range(0, len(payload), MESSAGE_BYTES):
                yield bytes(payload[start : start + MESSAGE_BYTES])

        return grpc.unary_stream_rpc_method_handler(stream)


def serve(pipe: Connection) -> None:
    """The server's process: sends its ports, adds a row to the node it is told, ends at None."""
    logs.configure("ERROR")
    store = MemoryStore()
    newest = {}
    for node, rows in NODES.items():
        times = START_NS + np.arange(rows) * STEP_NS
        store.create_window(node, rows).append(COLUMNS, times, values()[:rows])
        newest[node] = int(times[-1])
    server = Server(lambda: store, "127.0.0.1:0")
    server.start()
    bare = grpc.server(ThreadPoolExecutor(4), handlers=[BareStreams()])
    port = bare.add_insecure_port("127.0.0.1:0")
    bare.start()
    pipe.send((server.port, port))
    row = values()[:1]
    while (node := pipe.recv()) is not None:
        newest[node] += STEP_NS
        store.window(node).append(COLUMNS, np.array([newest[node]]), row)
        pipe.send("added")
    bare.stop(0)
    server.stop(0)


def spec() -> pb.SeriesSpec:
    return pb.SeriesSpec(
        node="a",
        features=COLUMNS,
        targets=COLUMNS[:1],
        lookback=LOOKBACK,
        horizon=HORIZON,
        train_fraction=1.0,
    )


def received(stub: pb_grpc.ProcessorServiceStub) -> list[tuple[np.ndarray, np.ndarray]]:
    """All sequences, as views on what was received."""
    answers = stub.GetSequences(pb.GetSequencesRequest(series=spec()), timeout=60)
    columns = len(next(answers).header.columns)
    rows = (np.frombuffer(answer.chunk.rows, "<f4").reshape(-1, columns) for answer in answers)
    return [sliding_windows(chunk, LOOKBACK, HORIZON) for chunk in rows]


def through_the_processor(stub: pb_grpc.ProcessorServiceStub) -> int:
    return sum(len(inputs) for inputs, _ in received(stub))


def through_the_processor_in_batches(stub: pb_grpc.ProcessorServiceStub) -> int:
    sequences = 0
    for inputs, targets in received(stub):
        for start in range(0, len(inputs), BATCH):
            batch = inputs[start : start + BATCH].copy(), targets[start : start + BATCH].copy()
            sequences += len(batch[0])
    return sequences


def through_a_bare_stream(channel: grpc.Channel, method: str) -> int:
    ask: Any = channel.unary_stream(method)
    size = sum(map(len, ask(b"", timeout=60)))
    sequences = ROWS - LOOKBACK - HORIZON + 1
    rows = ROWS if method == "/bare/rows" else sequences * (LOOKBACK + HORIZON)
    assert size == rows * len(COLUMNS) * 4
    return sequences


class PerItem(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """One sequence an item, cut in Python from an array in memory."""

    def __init__(self) -> None:
        self._rows = values().astype(np.float32)[: PER_ITEM_SEQUENCES + LOOKBACK + HORIZON - 1]

    def __len__(self) -> int:
        return PER_ITEM_SEQUENCES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        middle = index + LOOKBACK
        return (
            torch.from_numpy(self._rows[index:middle]),
            torch.from_numpy(self._rows[middle : middle + HORIZON]),
        )


def through_a_per_item_dataset(loader: DataLoader[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(len(inputs) for inputs, _ in loader)


@dataclass
class Way:
    """A way to get sequences, and its rates so far."""

    measure: Callable[[], int]
    before: Callable[[], object] = lambda: None
    rates: list[float] = field(default_factory=list)

    def take_turn(self) -> None:
        self.before()
        start = time.perf_counter()
        sequences = self.measure()
        self.rates.append(sequences / (time.perf_counter() - start))


def medians(ways: dict[str, Way], turns: int) -> dict[str, float]:
    """Median rates; the ways take turns, so what else the machine does falls on all of them."""
    for way in [way for _ in range(turns + WARM_UP) for way in ways.values()]:
        way.take_turn()
    return {name: statistics.median(way.rates[WARM_UP:]) for name, way in ways.items()}


def answered_bytes(stub: pb_grpc.ProcessorServiceStub, request: pb.GetSequencesRequest) -> int:
    return sum(answer.ByteSize() for answer in stub.GetSequences(request, timeout=60))


def measure_bytes(
    stub: pb_grpc.ProcessorServiceStub, series: pb.SeriesSpec, add_a_row: Callable[[], None]
) -> dict[str, int]:
    """Size of the answers after a new row, with kept steps and without."""
    request = pb.GetSequencesRequest(series=series, kept=pb.KeptSteps())
    request.kept.version = next(stub.GetSequences(request, timeout=60)).header.version
    add_a_row()
    everything = pb.GetSequencesRequest(series=series)
    return {"all": answered_bytes(stub, everything), "kept": answered_bytes(stub, request)}


def measure_kept(
    stub: pb_grpc.ProcessorServiceStub, address: str, node: str, add_a_row: Callable[[], None]
) -> dict[str, float]:
    """What the client's ``sequences`` costs after a new row, with kept steps and without."""
    query = Query(node, COLUMNS[0], COLUMNS[1:], LOOKBACK, HORIZON, 0.0, 0.8)
    seconds: dict[str, list[float]] = {"all": [], "kept": []}
    with (
        TemporaryDirectory() as folder,
        ProcessorClient(address) as everything,
        ProcessorClient(address, kept=KeptSteps(Path(folder))) as kept,
    ):
        for _ in range(KEPT_TURNS + WARM_UP):
            for name, client in (("all", everything), ("kept", kept)):
                add_a_row()
                start = time.perf_counter()
                client.sequences(query)
                seconds[name].append(time.perf_counter() - start)
    size = measure_bytes(stub, query.series(), add_a_row)
    both = {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()}
    return {
        "rows": NODES[node],
        "all_seconds": both["all"],
        "kept_seconds": both["kept"],
        "ratio": both["kept"] / both["all"],
        "all_bytes": size["all"],
        "kept_bytes": size["kept"],
        "bytes_ratio": size["kept"] / size["all"],
    }


def measure() -> tuple[dict[str, float], list[dict[str, float]]]:
    """Sequences a second, by way; and what kept steps spare."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    server.start()
    try:
        processor_port, bare_port = ours.recv()
        with (
            grpc.insecure_channel(f"127.0.0.1:{processor_port}") as processor,
            grpc.insecure_channel(f"127.0.0.1:{bare_port}") as bare,
        ):
            stub = pb_grpc.ProcessorServiceStub(processor)  # type: ignore[no-untyped-call]
            stub.ListNodes(pb.ListNodesRequest(), timeout=20, wait_for_ready=True)

            def add_a_row(node: str = "a") -> None:
                ours.send(node)
                ours.recv()

            loader = DataLoader(PerItem(), batch_size=BATCH)
            fast = {
                "processor": Way(lambda: through_the_processor(stub)),
                "bare": Way(lambda: through_a_bare_stream(bare, "/bare/rows")),
                "batches": Way(lambda: through_the_processor_in_batches(stub)),
                "refreshed": Way(lambda: through_the_processor(stub), add_a_row),
            }
            slow = {
                "windows": Way(lambda: through_a_bare_stream(bare, "/bare/windows")),
                "per_item": Way(lambda: through_a_per_item_dataset(loader)),
            }
            rates = medians(fast, FAST_TURNS) | medians(slow, SLOW_TURNS)
            address = f"127.0.0.1:{processor_port}"
            kept = [measure_kept(stub, address, node, partial(add_a_row, node)) for node in NODES]
            return rates, kept
    finally:
        ours.send(None)
        server.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    rates, kept = measure()
    ratios = {
        "of_bare": (rates["processor"] / rates["bare"], TARGET_OF_BARE),
        "refreshed_of_bare": (rates["refreshed"] / rates["bare"], None),
        "of_windows": (rates["processor"] / rates["windows"], None),
        "of_per_item": (rates["processor"] / rates["per_item"], TARGET_OF_PER_ITEM),
        "batches_of_per_item": (rates["batches"] / rates["per_item"], None),
    }
    if as_json:
        facts = {"rows": ROWS, "columns": len(COLUMNS), "lookback": LOOKBACK, "horizon": HORIZON}
        print(json.dumps({**facts, "sequences_a_second": rates, "ratios": {
            name: {"ratio": ratio, "target_min": target} for name, (ratio, target) in ratios.items()
        }, "kept_steps": kept}, indent=2))  # fmt: skip
        return
    print(f"{ROWS} rows of {len(COLUMNS)} columns, lookback {LOOKBACK}, horizon {HORIZON}\n")
    for name, rate in rates.items():
        print(f"{name:20} {rate:14,.0f} sequences/s")
    print()
    for name, (ratio, target) in ratios.items():
        verdict = "" if target is None else f"  target ≥ {target:g}: {ratio >= target}"
        print(f"{name:20} {ratio:14.2f}{verdict}")
    print()
    for of in kept:
        print(
            f"{of['rows']:>7} rows, one of them new: kept {of['kept_seconds'] * 1e3:.2f} ms, all"
            f" {of['all_seconds'] * 1e3:.2f} ms, ratio {of['ratio']:.2f}; {of['kept_bytes']:,} and"
            f" {of['all_bytes']:,} bytes, ratio {of['bytes_ratio']:.5f}"
        )


if __name__ == "__main__":
    main()
