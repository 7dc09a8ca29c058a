"""What a federated round costs on stock Flower and on the warm runtime, with the same app.

    uv run python benchmarks/rounds.py [--json] [--nodes 2 8] [--rounds 5]

The SuperLink, all SuperNodes, their SuperExecs and tasks share this machine. A round begins where
the one before ended; the first one, which makes the warm worker, is told apart. CPU seconds are
user and system time of all processes, ended ones included; memory is PSS, so that what processes
share counts once. The faults are those of the first node's ClientApp in every second round, on the
warm runtime. Takes about 15 minutes, most of it in stock Flower.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from icos_fl_service.testing import free_port

APP = Path(__file__).parent / "rounds_app"
HOST = "127.0.0.1"
IDLE_SECONDS = 120.0
REST_SECONDS = 45.0
"""After the last task; the warm worker ends 30 s after it."""


@dataclass
class Figures:
    """Of one runtime, one number of nodes and one computation."""

    first_seconds: float
    round_seconds: float
    overhead_seconds: float
    cpu_seconds: float
    rest_mib: float = field(default=float("nan"))
    idle_cpu_seconds: float = field(default=float("nan"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--rounds", type=int, default=5, help="of the warm runtime; stock: 3")
    parser.add_argument("--skip-rest", action="store_true", help="no memory and CPU at rest")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and leave no process behind
    results: dict[str, dict[str, float | dict[str, float]]] = {}
    for nodes in arguments.nodes:
        both = {}
        for runtime, rounds in (("stock", 3), ("warm", arguments.rounds)):
            rest = nodes == min(arguments.nodes) and not arguments.skip_rest
            both[runtime] = measure(runtime, nodes, rounds, rest)
        for compute in ("none", "lstm"):
            stock, warm = both["stock"][compute], both["warm"][compute]
            results[f"{nodes} nodes, {compute}"] = {
                "stock": vars(stock),
                "warm": vars(warm),
                "seconds_ratio": warm.round_seconds / stock.round_seconds,
                "cpu_ratio": warm.cpu_seconds / stock.cpu_seconds,
                "rest_ratio": warm.rest_mib / stock.rest_mib,
                "idle_ratio": warm.idle_cpu_seconds / stock.idle_cpu_seconds,
            }
    delays = faults(min(arguments.nodes))
    if arguments.json:
        print(json.dumps({"rounds": results, "faults": delays}, indent=2))
        return
    report(results)
    print("\nA round in which a ClientApp fails, against one in which none does; limit 0.5 s")
    for name, fault in delays.items():
        print(
            f"  {name:<6} {fault['delay_seconds']:+.2f} s   "
            f"memory {fault['first_mib']:.0f} to {fault['last_mib']:.0f} MiB"
        )


def faults(nodes: int) -> dict[str, dict[str, float]]:
    """How much longer the rounds with a fault take, beside what the app did itself (writing 500 MB
    takes a while), and the memory after the first and the last."""
    found = {}
    with federation("warm", nodes) as (home, processes):
        for fault in ("raise", "exit", "kill", "leak"):
            facts = follow(home, processes, "none", nodes, 9, fault)
            seconds = beside_training(facts)
            good, bad = seconds[2::2], seconds[1::2]  # the first round makes the worker
            found[fault] = {
                "delay_seconds": statistics.median(bad) - statistics.median(good),
                "first_mib": facts[1]["mib"],
                "last_mib": facts[-1]["mib"],
            }
    return found


def report(results: dict[str, dict[str, Any]]) -> None:
    for name, result in results.items():
        stock, warm = result["stock"], result["warm"]
        print(f"\n{name}")
        for label, key, ratio, limit in (
            ("s a round", "round_seconds", "seconds_ratio", 1 / 12),
            ("CPU s a round", "cpu_seconds", "cpu_ratio", 1 / 10),
            ("MiB at rest", "rest_mib", "rest_ratio", 1.0),
            ("CPU s idle, 2 min", "idle_cpu_seconds", "idle_ratio", 0.7),
        ):
            if warm[key] == warm[key]:
                print(
                    f"  {label:<18} stock {stock[key]:7.2f}  warm {warm[key]:7.2f}  "
                    f"ratio {result[ratio]:.3f}  limit {limit:.3f}"
                )
        print(
            f"  first round        stock {stock['first_seconds']:7.2f}  "
            f"warm {warm['first_seconds']:7.2f}"
        )
        print(
            f"  s beside training  stock {stock['overhead_seconds']:7.2f}  "
            f"warm {warm['overhead_seconds']:7.2f}  limit 0.9"
        )


def measure(runtime: str, nodes: int, rounds: int, rest: bool) -> dict[str, Figures]:
    with federation(runtime, nodes) as (home, processes):
        figures = {c: run(home, processes, c, nodes, rounds) for c in ("none", "lstm")}
        if rest:
            time.sleep(REST_SECONDS)
            memory = memory_mib(processes)
            before = cpu_seconds(processes)
            time.sleep(IDLE_SECONDS)
            idle = cpu_seconds(processes) - before
            for of in figures.values():
                of.rest_mib, of.idle_cpu_seconds = memory, idle
    return figures


@contextlib.contextmanager
def federation(runtime: str, nodes: int) -> Iterator[tuple[Path, list[psutil.Process]]]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        home = Path(folder)
        port, *node_ports = (free_port() for _ in range(1 + nodes))
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "local"\n\n[superlink.local]\n'
            f'address = "{HOST}:{port}"\ninsecure = true\n'
        )

        def start(name: str, *options: str) -> psutil.Process:
            command = [sys.executable, "-m", "icos_fl_warm_runtime", name, "--insecure", *options]
            log = stack.enter_context((home / f"{name}.log").open("a"))
            process = subprocess.Popen(
                command, env=environment(home, runtime), stdout=log, stderr=log
            )
            stack.callback(stop, process)
            return psutil.Process(process.pid)

        processes = [
            start(
                "superlink",
                *("--host", HOST, "--port", str(port)),
                "--disable-runtime-dependency-installation",
            )
        ]
        wait_for(port)
        for number, node_port in enumerate(node_ports):
            processes.append(
                start(
                    "supernode",
                    *("--superlink", f"{HOST}:{port}", "--host", HOST, "--port", str(node_port)),
                    *("--node-config", f"number={number}"),
                )
            )
        for node_port in node_ports:
            wait_for(node_port)
        yield home, processes


def run(
    home: Path, processes: list[psutil.Process], compute: str, nodes: int, rounds: int
) -> Figures:
    facts = follow(home, processes, compute, nodes, rounds)
    seconds = [b["at"] - a["at"] for a, b in itertools.pairwise(facts)]
    return Figures(
        first_seconds=seconds[0],
        round_seconds=statistics.median(seconds[1:]),
        overhead_seconds=statistics.median(beside_training(facts)[1:]),
        cpu_seconds=(facts[-1]["cpu_seconds"] - facts[1]["cpu_seconds"]) / (rounds - 1),
    )


def beside_training(facts: list[dict[str, Any]]) -> list[float]:
    """Seconds of each round less those of the slowest node's own work."""
    return [b["at"] - a["at"] - b["training_seconds"] for a, b in itertools.pairwise(facts)]


def follow(
    home: Path,
    processes: list[psutil.Process],
    compute: str,
    nodes: int,
    rounds: int,
    fault: str = "",
) -> list[dict[str, Any]]:
    """One run of the app: facts of its start and of each round; CPU and memory as it ended."""
    times = home / f"{compute}{fault}.jsonl"
    config = f'compute="{compute}" fault="{fault}" rounds={rounds} nodes={nodes} times="{times}"'
    flwr = str(Path(sys.executable).parent / "flwr")
    submitted = subprocess.run(
        [sys.executable, flwr, "run", str(APP), "local", "--run-config", config],
        env=environment(home, "warm"),
        capture_output=True,
        text=True,
    )
    if submitted.returncode:
        raise SystemExit(submitted.stdout + submitted.stderr)
    facts: list[dict[str, Any]] = []
    deadline = time.monotonic() + 1200
    while len(facts) <= rounds:
        if time.monotonic() > deadline:
            raise SystemExit(f"round {len(facts)} did not end\n" + logs(home))
        lines = times.read_text().splitlines() if times.exists() else []
        for line in lines[len(facts) :]:
            measured = {"cpu_seconds": cpu_seconds(processes), "mib": memory_mib(processes)}
            facts.append(json.loads(line) | measured)
        time.sleep(0.02)
    if "started cold" in logs(home):
        raise SystemExit("the warm runtime was not warm:\n" + logs(home))
    return facts


def tree(processes: list[psutil.Process]) -> list[psutil.Process]:
    alive = [p for p in processes if p.is_running()]
    return [*alive, *(child for p in alive for child in p.children(recursive=True))]


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Of all processes, those that have ended and were waited for included."""
    total = 0.0
    for process in tree(processes):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])
    return total


def memory_mib(processes: list[psutil.Process]) -> float:
    total = 0
    for process in tree(processes):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 2**20


def environment(home: Path, runtime: str) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "ICOS_FL_RUNTIME": runtime,
        "OMP_NUM_THREADS": "1",
    }


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection((HOST, port), timeout=1).close()
            return
        time.sleep(0.1)
    raise SystemExit(f"nothing listens on port {port}")


def logs(home: Path) -> str:
    return "\n".join(path.read_text() for path in home.glob("*.log"))


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
