"""Runs a federation of containers on this machine, and checks what it promises.

Builds every image; starts a controller and two nodes as compose projects (deploy/compose), each
with networks of its own, which meet on one network as machines do; lets the nodes join, train and
forecast; tries what a stranger on that network can do; upgrades services under load; kills some;
and looks at what went over the network. Needs docker or podman, and root, as it captures packets.
Exit status 0: all held; 1: something did not; 2: it could not be tried.
"""

import argparse
import json
import os
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from capture import Capture, Traffic
from deployments import DEPLOY, Controller, Deployment, Fault, Node, Run, run, wait_for
from icos_fl_local import traces

sys.path += [str(DEPLOY / "images"), str(DEPLOY / "compose/sources")]

from engine import BuildError, Engine
from images import IMAGES
from replay import later

NETWORK = "icos-fl-rehearsal"
SUBNET = "10.213.8"
TRACES = ("upm-energy/pfe1.csv", "bsc-power-modelling/xeon-e5-2640.csv")
METRICS = ("power_consumption", "cpu_usage")
# All that listens on a node or behind the gateway.
PORTS = (
    6379,
    6867,
    8000,
    8080,
    8089,
    8090,
    8091,
    8676,
    9093,
    9464,
    9465,
    9466,
    9467,
    9470,
    9471,
    13133,
    16587,
    4317,
    50051,
    50052,
)
SUPERNODE_PORT = 9094
ROUND_TIMEOUT_SECONDS = 20
NEXT = "next"
"""The tag of an upgrade: the same image, as what is upgraded is the deployment."""


class Rehearsal:
    """The steps, in their order."""

    def __init__(self, engine: str, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.started: list[Deployment] = []
        self.table: list[tuple[bool, float, str, str]] = []

    def step(self, name: str, do: Callable[[], str]) -> bool:
        """Do it, and print how long it took and what it found; False if it did not hold."""
        started = time.monotonic()
        try:
            held, found = True, do()
        except Fault as fault:
            held, found = False, str(fault)
        except Exception as error:
            traceback.print_exc()
            held, found = False, repr(error)
        seconds = time.monotonic() - started
        self.table.append((held, seconds, name, found))
        print(line(*self.table[-1]), flush=True)
        return held

    def go(self) -> None:
        """Everything; what follows from a start that failed is left out."""
        if not self.step("controller", self.start_controller):
            return
        with Capture(self.interface(NETWORK)) as between:
            if not (self.step("join", self.join) and self.step("nodes", self.start_nodes)):
                return
            with Capture(self.interface(f"{self.nodes[0].name}_data")) as within:
                self.step("federate", self.federate)
                self.step("forecast", self.forecast)
            self.step("page", self.page)
            self.step("strangers", self.strangers)
            self.step("upgrade", self.upgrade)
            self.step("upgrade quiesced", self.upgrade_flower)
            self.step("SuperLink killed", self.kill_superlink)
            self.step("SuperNode killed", self.kill_supernode)
        self.step("captured", lambda: self.judge(between, within))

    # Start

    def start_controller(self) -> str:
        """The network between the machines, and the controller on it."""
        run(self.engine, "network", "create", "--subnet", f"{SUBNET}.0/24", NETWORK)
        self.controller = Controller(
            self.engine, self.folder / "rehearsal-controller", NETWORK, f"{SUBNET}.2"
        )
        self.nodes = [
            Node(self.engine, self.folder / f"rehearsal-edge-{number}", NETWORK, trace)
            for number, trace in enumerate(TRACES)
        ]
        self.started = [self.controller]
        self.controller.compose("up")
        return f"the gateway is {self.controller.gateway}"

    def join(self) -> str:
        """By invitation and key."""
        said = [node.join(self.controller.invite(node.name)) for node in self.nodes]
        return "; ".join(text.splitlines()[0] for text in said)

    def start_nodes(self) -> str:
        """Until the windows hold all of two traces, and what the Collectors measure."""
        found = []
        for node in self.nodes:
            self.started.insert(0, node)
            node.compose("up")
            rows = len(node.trace.read_text().splitlines()) - 1
            wait_for(f"{node.name}: {rows} rows", lambda: node.acknowledged() >= rows)  # noqa: B023
            wait_for(f"{node.name}: the Collector's rows", lambda: self.measured(node))  # noqa: B023
            found.append(f"{node.name} replays {rows} rows of {node.trace.stem}")
        return "; ".join(found)

    def measured(self, node: Node) -> int:
        """Rows of the real Collector of *node*."""
        with suppress(Fault):  # no such window yet
            return len(node.window(f"{node.name}-host"))
        return 0

    def interface(self, network: str) -> str:
        """The kernel's name of it."""
        facts = json.loads(run(self.engine, "network", "inspect", network))[0]
        return str(facts.get("network_interface") or f"br-{facts['Id'][:12]}")

    # What it is for

    def federate(self) -> str:
        """Five rounds with both nodes."""
        rounds = self.controller.train(5).finished()
        both(rounds)
        losses = {
            metric: " > ".join(f"{r['metrics'][metric]['eval_loss']:.3f}" for r in rounds)
            for metric in METRICS
        }
        return f"{len(rounds)} rounds of both nodes, {losses}"

    def forecast(self) -> str:
        """On each node, by itself, when a lookback has come since the trace's last gap."""
        found = []
        for node in self.nodes:

            def said(node: Node = node) -> list[dict[str, Any]] | None:
                with suppress(Fault):
                    forecasts = node.forecasts()
                    return forecasts if len(forecasts) == len(METRICS) else None
                return None

            found += [
                f"{node.name} {one['metric']} {one['yhat'][-1]:.1f} {one['unit']}"
                for one in wait_for(f"forecasts of {node.name}", said)
            ]
            node.wait_expected(METRICS)
        return ", ".join(found)

    def page(self) -> str:
        """The controller's, of the newest run: its rounds, and both nodes, online."""

        def online() -> dict[str, Any] | None:
            told = self.controller.page()
            return told if all(n["online"]["state"] == "online" for n in told["nodes"]) else None

        told = wait_for("both nodes to be online on the page", online)
        versions = {node["name"]: node["versions"] for node in told["nodes"]}
        if [*versions] != [node.name for node in self.nodes] or not all(versions.values()):
            raise Fault(f"the page tells of nodes {versions}")
        if (state := told["run"]["state"]) != "finished":
            raise Fault(f"the page tells that the run is {state}")
        return f"{len(told['run']['rounds'])} rounds, {versions}"

    # Strangers

    def strangers(self) -> str:
        """From a container on the network of all."""
        addresses = {node.name: node.addresses() for node in (self.controller, *self.nodes)}
        every = {ip for each in addresses.values() for ips in each.values() for ip in ips if ip}
        names = {service for each in addresses.values() for service in each} - {"gateway"}
        targets = [(host, port) for host in sorted(every | names) for port in PORTS]
        found = self.stranger(targets)
        if found["reached"]:
            raise Fault(f"a stranger reaches {found['reached']}")
        open_ = {path: status for path, status in found["answers"].items() if status != "404"}
        if open_:
            raise Fault(f"the gateway answers {open_}")
        for what, expected in (
            ("unknown key", "HTTPStatusError: Client error"),
            ("wrong authority", "CERTIFICATE_VERIFY_FAILED"),
            ("run", "404"),
        ):
            if expected not in found[what] or '"success": true' in found[what]:
                raise Fault(f"{what}: {found[what]}")
        self.guarded_supernodes(addresses)
        self.probe_works(addresses)
        return (
            f"{len(targets)} ports of {len(every)} addresses and {len(names)} names: none reached; "
            f"{len(found['answers'])} paths of the SuperLink: 404; unknown key, wrong authority, "
            "a stranger's run: refused"
        )

    def stranger(self, targets: list[tuple[str, int]], network: str = NETWORK) -> dict[str, Any]:
        """What stranger.py found there."""
        from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

        other = Path(tempfile.mkdtemp(dir=self.folder))
        run(sys.executable, "-m", "icos_fl_local", "certs", "node", cwd=other)
        given = {
            "gateway": self.controller.gateway,
            "targets": targets,
            "paths": sorted(
                {path for _, path in PROTOBUF_REQUEST_TYPES if not path.startswith("/v1/fleet/")}
                | {"/v1/fleet/register-node", "/v1/fleet/unregister-node", "/health", "/docs"}
            ),
            "other_authority": (other / "certs/ca.pem").read_text(),
        }
        text = run(
            *(self.engine, "run", "--rm", "--interactive", "--network", network),
            *("--volume", f"{self.controller.folder}/certs/ca.pem:/run/gateway-ca.pem:ro"),
            *("--volume", f"{DEPLOY}/rehearsal/stranger.py:/stranger.py:ro"),
            *("--no-healthcheck", "--entrypoint", "python3", tag("fl-server"), "/stranger.py"),
            given=json.dumps(given),
        )
        return dict(json.loads(text.splitlines()[-1]))

    def probe_works(self, addresses: dict[str, dict[str, list[str]]]) -> None:
        """Who is on a node's inner network is told that the store is there."""
        node = self.nodes[0]
        targets = [(addresses[node.name]["metadata"][0], 16587), ("processor", 50051)]
        found = self.stranger(targets, f"{node.name}_data")
        if found["reached"] != [list(target) for target in targets]:
            raise Fault(f"even from inside a stranger reaches only {found['reached']}")

    def guarded_supernodes(self, addresses: dict[str, dict[str, list[str]]]) -> None:
        """A SuperNode is on the network of all, and refuses who has not its secret."""
        from stranger import status

        for node in self.nodes:
            for ip in addresses[node.name]["supernode"]:
                if ip.startswith(f"{SUBNET}."):
                    for path in ("/v1/runtime/acquire-task", "/v1/runtime/pull-task-input"):
                        answer = status(f"{ip}:{SUPERNODE_PORT}", path)
                        if answer not in ("401", "403"):
                            raise Fault(f"the SuperNode of {node.name} answers {path}: {answer}")

    # Upgrades

    def upgrade(self) -> str:
        """Each service of a node, and the gateway, while rows come and a run is under way."""
        node = self.nodes[0]
        with self.controller.train(1000) as training:
            training.wait_rounds(1)
            found = [
                self.upgrade_one(deployment, image, services, training)
                for deployment, image, *services in (
                    (node, "otlp-bridge", "otlp-bridge"),
                    (node, "processor", "processor"),
                    (node, "timeseries-store", "kv", "metadata", "backend", "proxy"),
                    (node, "otel-collector", "collector"),
                    (self.controller, "gateway", "gateway"),
                )
            ]
        return f"{node.acknowledged()} rows acknowledged; {'; '.join(found)}"

    def upgrade_one(
        self, deployment: Deployment, image: str, services: list[str], training: Run
    ) -> str:
        """Until rows come again and two more rounds are over."""
        node = self.nodes[0]
        before, acknowledged = len(training.rounds()), node.acknowledged()
        seconds = self.replace(deployment, image, *services)
        wait_for("more rows", lambda: node.acknowledged() > acknowledged + 20)
        training.wait_rounds(before + 2)
        missing = lost_rows(node)
        lost = sum(not is_both(one) for one in training.rounds()[before:])
        found = f"{image} in {seconds:.0f} s, {missing} rows and {lost} rounds lost"
        if missing or lost > 1:
            raise Fault(found)
        return found

    def upgrade_flower(self) -> str:
        """SuperNodes, SuperLink and their SuperExecs, between two rounds of a training."""
        rounds = 8
        training = self.controller.train(rounds)
        training.wait_rounds(2)
        training.quiesce()
        first = training.rounds()
        seconds = [self.replace(node, "fl-client") for node in self.nodes]
        seconds.append(self.replace(self.controller, "fl-server"))
        again = time.monotonic()
        left = self.controller.train(rounds - len(first), resume=training.folder)
        both([*first, *left.finished()])
        return (
            f"quiesced after round {len(first)}; fl-client, fl-client, fl-server in "
            f"{', '.join(f'{each:.0f}' for each in seconds)} s; the other {rounds - len(first)} "
            f"rounds within {time.monotonic() - again:.0f} s, none lost"
        )

    def replace(self, deployment: Deployment, image: str, *services: str) -> float:
        """*services*, or all that have it, with the image of another tag; the seconds it took."""
        started = time.monotonic()
        run(self.engine, "tag", tag(image), f"icos-fl/{image}:{NEXT}")
        deployment.set(**{f"ICOS_FL_VERSION_{image.upper().replace('-', '_')}": NEXT})
        deployment.compose("up", *services)
        return time.monotonic() - started

    # What went over the network

    def judge(self, between: Capture, within: Capture) -> str:
        """Only TLS between the machines; and within a node the same patterns are found."""
        names = [*METRICS, "cpu_percent", "scaph_host_power", "memory_available", "memory_usage"]
        values = {
            value
            for node in self.nodes
            for row in node.window().values()
            for value in row.values()
            if value != round(value)  # a whole number has bytes that others have too
        }
        patterns = [name.encode() for name in names]
        for value in values:
            patterns += [struct.pack("<d", value), struct.pack(">d", value)]
        traffic = Traffic.of(between.frames)
        if between.lost:
            raise Fault(f"{between.lost} frames were not captured")
        if bad := traffic.what_is_not_tls():
            raise Fault(f"not TLS: {bad[:5]}")
        if found := between.holds(patterns):
            raise Fault(f"a stranger reads {found[:5]}")
        seen = within.holds(patterns)
        if not {name.encode() for name in METRICS} < {*seen} or len(seen) < 20:
            raise Fault(f"of the node's own network, where they are, {seen[:5]} alone were found")
        size = sum(map(len, between.frames)) / 1e6
        return (
            f"{size:.1f} MB in {len(between.frames)} frames, {len(traffic.streams)} streams, TLS; "
            f"beside them {dict(traffic.others)}; of {len(patterns)} names and values none "
            f"(on a node's own network {len(seen)})"
        )

    # Kills

    def kill_superlink(self) -> str:
        """In mid-run; the engine starts it again, and the run goes on."""
        training = self.controller.train(8)
        training.wait_rounds(2)
        before = self.controller.started("superlink")
        self.controller.kill("superlink")
        wait_for("its restart", lambda: self.controller.started("superlink") != before)
        rounds = training.finished()
        both(rounds)
        longest = max(one["seconds"] for one in rounds)
        return f"killed after round 2; all 8 rounds of both nodes, the longest {longest:.1f} s"

    def kill_supernode(self) -> str:
        """In mid-run: the round ends at its timeout, and the node takes part again by itself."""
        with self.controller.train(1000, round_timeout=ROUND_TIMEOUT_SECONDS) as training:
            training.wait_rounds(2)
            node, start = self.nodes[1], self.nodes[1].started("supernode")
            node.kill("supernode")
            killed, before = time.monotonic(), len(training.rounds())
            wait_for("its restart", lambda: node.started("supernode") != start)

            def again() -> list[dict[str, Any]]:
                """The round that was in hand may have had its reply, so a later one counts."""
                rounds = training.rounds()[before:]
                return rounds if len(rounds) > 1 and is_both(rounds[-1]) else []

            rounds = wait_for("its taking part again", again)
            seconds = time.monotonic() - killed
        without = [one for one in rounds if not is_both(one)]
        longest = max((one["seconds"] for one in without), default=0.0)
        if longest > ROUND_TIMEOUT_SECONDS + 5:
            raise Fault(f"a round without it took {longest:.1f} s")
        return (
            f"it took part again after {seconds:.0f} s; {len(without)} rounds without it, the "
            f"longest {longest:.1f} s, with a timeout of {ROUND_TIMEOUT_SECONDS}"
        )

    # Stop

    def stop(self) -> str:
        """Everything that was started."""
        for deployment in self.started:
            deployment.down()
        run(self.engine, "network", "rm", NETWORK)
        left = run(self.engine, "ps", "--all", "--format", "{{.Names}}").split()
        if mine := [name for name in left if name.startswith("rehearsal-")]:
            raise Fault(f"there still is {mine}")
        return "no container, network or volume is left"


def tag(image: str) -> str:
    return f"icos-fl/{image}:{IMAGES[image].version()}"


def is_both(one: dict[str, Any]) -> bool:
    """Did both nodes take part in the round?"""
    return [node["state"] for node in one["nodes"].values()] == ["ok", "ok"]


def both(rounds: list[dict[str, Any]]) -> None:
    if bad := [one for one in rounds if not is_both(one)]:
        raise Fault(f"round {bad[0]['round']}: {bad[0]['nodes']}")


def lost_rows(node: Node) -> int:
    """Of the rows that the bridge acknowledged, those that the window lacks or has otherwise."""
    acknowledged, window = node.acknowledged(), node.window()
    trace = next(t for t in traces.load(node.trace.parent) if t.node == node.trace.stem)
    names = [traces.column_of(column) for column in trace.columns]
    lost = 0
    for number in range(acknowledged):
        lap, row = divmod(number, len(trace.times_s))
        sent = dict(zip(names, trace.values_tf[row].tolist(), strict=True))
        lost += window.get(int(later(trace, lap).times_s[row])) != sent
    return lost


def line(held: bool, seconds: float, name: str, found: str) -> str:
    """Of the table."""
    return f"{'held' if held else 'FAILED':<8}{seconds:>7.1f} s  {name:<18}{found}"


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="rehearse", description=__doc__)
    parser.add_argument("--no-build", action="store_true", help="the images are there already")
    arguments = parser.parse_args()
    if Path("/run/systemd/system").exists() is False:
        os.environ.setdefault("CONTAINERS_CONF", str(DEPLOY / "containers.conf"))
    try:
        engine = Engine().command
        if os.geteuid():
            raise BuildError("it needs root, as it captures packets and kills processes")
    except BuildError as error:
        print(f"rehearse: {error}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="icos-fl-rehearsal-"))
    rehearsal = Rehearsal(engine, folder)
    try:
        if arguments.no_build or rehearsal.step("images", build):
            rehearsal.go()
    finally:
        rehearsal.step("stop", rehearsal.stop)
        shutil.rmtree(folder)
    print()
    for row in rehearsal.table:
        print(line(*row))
    return int(not all(held for held, *_ in rehearsal.table))


def build() -> str:
    """All of them, with the table of their sizes."""
    print(table := run(DEPLOY / "build-images"))
    if "over its budget" in table:
        raise Fault("an image is over its budget")
    return f"{len(IMAGES)} images"


if __name__ == "__main__":
    sys.exit(main())
