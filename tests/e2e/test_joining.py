"""A controller behind its gateway, nodes that join by two commands, and strangers who do not."""

import base64
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from icos_fl_service.testing import free_port

ROOT = Path(__file__).parents[2]
APP = ROOT / "packages/warm-runtime/tests/app"
HOST = "127.0.0.1"
PATIENCE_SECONDS = 180.0
PROTOBUF = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE}


class Machine:
    """A folder, and processes in it that end with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def env(self) -> dict[str, str]:
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "ICOS_FL_"))}
        return mine | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, name: str, *command: str | Path, **env: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.folder,
                env=self.env | env,
                stdout=log,
                stderr=log,
            )
        return self.processes[name]

    def python(self, name: str, *arguments: str | Path, **env: str) -> subprocess.Popen[bytes]:
        return self.start(name, sys.executable, "-m", *arguments, **env)

    def run(
        self, *arguments: str, given: str = "", program: tuple[str, ...] = ("-m", "icos_fl_local")
    ) -> subprocess.CompletedProcess[str]:
        """``icos-fl`` with *arguments*."""
        return subprocess.run(
            [sys.executable, *program, *arguments],
            cwd=self.folder,
            env=self.env,
            input=given,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait_until(self, condition: Callable[[], bool], *running: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            ended = [name for name in running if self.processes[name].poll() is not None]
            assert not ended, f"{ended} ended\n{self.logs()}"
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        tails = (f"--- {path}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))
        return "\n".join(tails)

    def stop(self) -> None:
        """AssertionError if something that was started does not end."""
        started = [
            child
            for process in self.processes.values()
            if process.poll() is None
            for child in psutil.Process(process.pid).children(recursive=True)
        ]
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        _, left = psutil.wait_procs(started, 30)
        for process in left:
            process.kill()
        for one in self.processes.values():
            if one.poll() is None:
                one.kill()
                one.wait()
        assert not left


def listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((HOST, port), 1).close()
        return True
    return False


class Controller(Machine):
    """SuperLink with its SuperExec, enrolment and gateway, of which strangers know the last."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        made = self.run("certs", "controller", "--name", "localhost", "--name", HOST)
        assert made.returncode == 0, made.stderr
        self.superlink_port, self.enrolment_port, self.port = (free_port() for _ in range(3))
        self.gateway = f"localhost:{self.port}"
        self.ca = folder / "certs/ca.pem"
        (folder / "secret").write_text(secrets.token_hex(32))
        (folder / "flwr").mkdir()
        (folder / "flwr/config.toml").write_text(
            f'[superlink]\ndefault = "own"\n'
            f'[superlink.own]\naddress = "localhost:{self.superlink_port}"\n'
            f'root-certificates = "{self.ca}"\n'
            f'[superlink.gateway]\naddress = "{self.gateway}"\n'
            f'root-certificates = "{self.ca}"\n'
        )

    @property
    def env(self) -> dict[str, str]:
        return super().env | {
            "ICOS_FL_ENROLMENT_GATEWAY": f"localhost:{getattr(self, 'port', 0)}",
            "ICOS_FL_ENROLMENT_SUPERLINK": f"localhost:{getattr(self, 'superlink_port', 0)}",
            "ICOS_FL_ENROLMENT_LISTEN_ADDRESS": f"{HOST}:{getattr(self, 'enrolment_port', 0)}",
        }

    def start_all(self) -> None:
        self.start_superlink()
        self.python(
            "superexec", "icos_fl_warm_runtime", "superexec",
            "--runtime-api-address", f"localhost:{self.superlink_port}",
            "--root-certificates", self.ca,
            "--superexec-auth-secret-file", self.folder / "secret",
        )  # fmt: skip
        self.python("enrolment", "icos_fl_server", "enrolment")
        self.start_gateway()
        self.wait_until(lambda: listens(self.enrolment_port), "enrolment")

    def start_superlink(self) -> None:
        self.python(
            "superlink", "icos_fl_warm_runtime", "superlink",
            "--ssl-certfile", "certs/superlink.pem", "--ssl-keyfile", "certs/superlink.key",
            "--ssl-ca-certfile", "certs/ca.pem", "--host", HOST, "--port", str(self.superlink_port),
            "--enable-supernode-auth", "--database", "superlink.db", "--isolation", "process",
            "--superexec-auth-secret-file", "secret", "--disable-runtime-dependency-installation",
        )  # fmt: skip
        self.wait_until(lambda: listens(self.superlink_port), "superlink")

    def start_gateway(self) -> None:
        # nginx' workers are another user's, if root starts it, and pytest's folders are ours alone.
        nginx = Path(tempfile.mkdtemp(prefix="icos-fl-gateway-"))
        nginx.chmod(0o755)
        self.start(
            "gateway", ROOT / "deploy/gateway/gateway",
            ICOS_FL_GATEWAY_LISTEN=f"{HOST}:{self.port}",
            ICOS_FL_GATEWAY_SUPERLINK=f"{HOST}:{self.superlink_port}",
            ICOS_FL_GATEWAY_ENROLMENT=f"{HOST}:{self.enrolment_port}",
            ICOS_FL_GATEWAY_SECRETS=str(self.folder / "certs"),
            ICOS_FL_GATEWAY_FOLDER=str(nginx),
        )  # fmt: skip
        self.nginx = nginx
        self.wait_until(lambda: listens(self.port), "gateway")

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self.nginx)

    def invite(self, name: str) -> str:
        done = self.run("node", "invite", name)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def states(self) -> dict[str, str]:
        """Of each node, as ``icos-fl node list`` tells it."""
        done = self.run("node", "list", "--json")
        assert done.returncode == 0, done.stderr
        return {row["name"]: row["state"] for row in json.loads(done.stdout)}

    def flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        flwr = str(Path(sys.executable).parent / "flwr")
        return self.run(*arguments, "--format", "json", program=(flwr,))

    def train(self, **config: Any) -> "Run":
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        file = folder / "config.toml"
        config |= {"folder": str(folder)}
        lines = (f"{k} = {json.dumps(v)}\n" for k, v in config.items())
        file.write_text("".join(lines))
        done = self.flwr("run", str(APP), "own", "--run-config", str(file))
        assert '"success": true' in done.stdout, done.stdout + done.stderr
        return Run(self, folder)

    def controlled(self) -> int:
        """How many requests the Control API has had."""
        return self.log("superlink").count("ControlServicer.")


class Run:
    """A run of the small app, whose ServerApp tells each round."""

    def __init__(self, controller: Controller, folder: Path) -> None:
        self._controller, self.folder = controller, folder

    def facts(self) -> list[dict[str, Any]]:
        path = self.folder / "facts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def replied(self) -> list[list[int]]:
        """Who replied in each round, once the run is over."""
        self._controller.wait_until(lambda: any("over" in fact for fact in self.facts()))
        *rounds, _ = self.facts()
        print("rounds:", [round(fact["seconds"], 2) for fact in rounds])
        return [fact["replied"] for fact in rounds]


class NodeMachine(Machine):
    """A machine that becomes a node."""

    def join(self, invitation: str) -> subprocess.CompletedProcess[str]:
        return self.run("node", "join", "-", given=invitation)

    def settings(self) -> dict[str, str]:
        lines = (self.folder / "node/node.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def start_supernode(self, number: int = 0, ca: Path | None = None) -> None:
        """As the deployment does, by what the two commands left here."""
        if not (self.folder / "certs").exists():
            made = self.run("certs", "node")
            assert made.returncode == 0, made.stderr
        self.python(
            "supernode", "icos_fl_warm_runtime", "supernode",
            "--superlink", self.settings()["ICOS_FL_NODE_SUPERLINK"],
            "--root-certificates", ca or "node/gateway-ca.pem",
            "--auth-supernode-private-key", "node/supernode.key",
            "--ssl-certfile", "certs/supernode.pem", "--ssl-keyfile", "certs/supernode.key",
            "--ssl-ca-certfile", "certs/ca.pem", "--host", HOST, "--port", str(free_port()),
            "--node-config", f"number={number}",
        )  # fmt: skip

    def fleet(self) -> FleetHttpClient:
        """Flower's client of the node API, with this node's key."""
        key: Any = serialization.load_ssh_private_key(
            (self.folder / "node/supernode.key").read_bytes(), None
        )
        return fleet(self.settings()["ICOS_FL_NODE_SUPERLINK"], self.folder, key)


def fleet(address: str, folder: Path, key: ec.EllipticCurvePrivateKey) -> FleetHttpClient:
    return FleetHttpClient.from_server_address(
        address,
        insecure=False,
        root_certificates=(folder / "node/gateway-ca.pem").read_bytes(),
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
    )


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    controller = Controller(tmp_path_factory.mktemp("controller"))
    try:
        controller.start_all()
        yield controller
    finally:
        controller.stop()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[NodeMachine]:
    """A machine that is no node yet."""
    machine = NodeMachine(tmp_path)
    yield machine
    machine.stop()


@pytest.fixture(scope="module")
def nodes(
    controller: Controller, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[NodeMachine]]:
    """Two nodes that joined and are connected."""
    with contextlib.ExitStack() as stack:
        machines = []
        for number, name in enumerate(("edge-0", "edge-1")):
            node = NodeMachine(tmp_path_factory.mktemp(name))
            stack.callback(node.stop)
            joined = node.join(controller.invite(name))
            assert joined.returncode == 0, joined.stderr
            node.start_supernode(number)
            machines.append(node)
        for node in machines:
            node.wait_until(lambda node=node: "SuperNode ID:" in node.log("supernode"), "supernode")
        yield machines


def test_nodes_that_joined_by_two_commands_train_through_the_gateway(controller, nodes):
    assert controller.states() == {"edge-0": "online", "edge-1": "online"}
    assert nodes[0].settings() == {
        "ICOS_FL_NODE_NAME": "edge-0",
        "ICOS_FL_NODE_SUPERLINK": controller.gateway,
    }
    assert controller.train(rounds=4, timeout=120.0).replied() == [[0, 1]] * 4


def test_arrays_of_more_than_a_message_pass(controller, nodes):
    run = controller.train(rounds=2, floats=16_000_000, timeout=150.0)  # 64 MB
    assert run.replied() == [[0, 1]] * 2


def test_a_question_is_held_until_there_is_an_answer(controller, nodes, machine):
    joined = machine.join(controller.invite("holds"))
    assert joined.returncode == 0, joined.stderr
    with machine.fleet() as client:
        key = (machine.folder / "node/supernode.key").read_bytes()
        public: Any = serialization.load_ssh_private_key(key, None)
        request = ActivateNodeRequest(
            public_key=public_key_to_bytes(public.public_key()), heartbeat_interval=60
        )
        node_id = client.ActivateNode(request).node_id
        began = time.monotonic()
        answer = client.PullMessages(PullMessagesRequest(node=Node(node_id=node_id)))
        held = time.monotonic() - began
    assert not answer.messages_list
    assert 19 < held < 30
    assert controller.run("node", "remove", "holds").returncode == 0


def test_renewed_certificates_and_a_superlink_that_is_killed_cost_no_run(controller, nodes):
    run = controller.train(
        rounds=4, timeout=150.0, faults=json.dumps({"2": {"fault": "waits", "node": 1}})
    )
    controller.wait_until(lambda: (run.folder / "task-2").exists())
    assert controller.run("certs", "renew", "--all").returncode == 0
    for name in ("gateway", "superlink", "enrolment"):
        controller.processes[name].send_signal(signal.SIGHUP)
    served = {"gateway": controller.port, "enrolment": controller.enrolment_port}
    for name, port in (served | {"superlink": controller.superlink_port}).items():
        new = (controller.folder / f"certs/{name}.pem").read_text()
        controller.wait_until(
            lambda port=port, new=new: ssl.get_server_certificate((HOST, port)) == new
        )
    controller.processes["superlink"].kill()
    controller.processes["superlink"].wait()
    (run.folder / "go-2").touch()
    controller.start_superlink()
    assert run.replied() == [[0, 1]] * 4


def everything_else() -> list[str]:
    """Each path of a SuperLink but those of the node API that a node needs, and ways around."""
    from flwr.superlink.main import create_app

    paths = {path for _, path in PROTOBUF_REQUEST_TYPES} | set(create_app().openapi()["paths"])
    ways = (
        "/",
        "/docs",
        "/openapi.json",
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/..%2fcontrol%2flist-nodes",
        "/v1/fleet/pull-messages/../../control/list-nodes",
        "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2flist-nodes",
        "/v1/fleet/pull-messages%00/../../control/list-nodes",
        "/v1/fleet/pull-messages;/../../control/list-nodes",
        "//v1/control/list-nodes",
        "/v1//control/list-nodes",
        "/enrol/../v1/control/list-nodes",
        "/V1/CONTROL/LIST-NODES",
        "/v1/control/list-nodes?/v1/fleet/pull-messages",
        "/v1/control/list-nodes%3f/v1/fleet/pull-messages",
        "/v1/icos-fl/warm",
    )
    nodes = re.compile(
        r"/v1/fleet/(activate-node|deactivate-node|send-node-heartbeat|pull-messages|push-messages"
        r"|get-run|get-fab|push-object|pull-object|confirm-message-received)"
    )
    return [*sorted(path for path in paths if not nodes.fullmatch(path)), *ways]


def raw(port: int, request: bytes) -> bytes:
    """The answer's status, to a request as it is written here."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((HOST, port), 30) as plain,
        context.wrap_socket(plain) as secure,
    ):
        secure.sendall(request)
        return (secure.recv(100).split() or [b"", b"closed"])[1]


def test_no_path_but_the_nodes_is_there_from_outside(controller, nodes):
    paths = everything_else()
    assert {"/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/health"} < set(paths)
    before = controller.controlled()
    head = f"Host: localhost\r\nContent-Type: {PROTOBUF_MEDIA_TYPE}\r\nContent-Length: 0\r\n"
    answers = {
        f"{method} {path}": raw(
            controller.port, f"{method} {path} HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode()
        )
        for path in paths
        for method in ("POST", "GET")
    }
    others = {what: status for what, status in answers.items() if status != b"404"}
    # nginx itself refuses a zero byte in a path.
    assert set(others.values()) <= {b"400"}
    assert all("%00" in what for what in others)
    assert controller.controlled() == before
    trust = ssl.create_default_context(cafile=controller.ca)
    with httpx.Client(verify=trust, headers=PROTOBUF) as inside:
        body = ListNodesRequest().SerializeToString()
        url = f"https://localhost:{controller.superlink_port}/v1/control/list-nodes"
        assert inside.post(url, content=body).status_code == 200
    assert controller.controlled() == before + 1


def test_a_request_in_a_request_reaches_nobody(controller, nodes):
    before = controller.controlled()
    hidden = "POST /v1/control/list-nodes HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
    length = f"Content-Length: {len(hidden) + 5}\r\n"
    for headers in (
        f"Transfer-Encoding: chunked\r\n{length}",
        f"{length}Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding: xchunked\r\n",
    ):
        request = (
            "POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\n"
            f"Content-Type: {PROTOBUF_MEDIA_TYPE}\r\n{headers}\r\n0\r\n\r\n{hidden}"
        )
        raw(controller.port, request.encode())
    assert controller.controlled() == before


def test_a_strangers_run_is_refused(controller, nodes):
    before = controller.controlled()
    done = controller.flwr("run", str(APP), "gateway")
    assert '"success": true' not in done.stdout
    assert "404" in done.stdout + done.stderr
    assert controller.controlled() == before


def test_a_key_that_nobody_registered_is_refused(controller, nodes, machine):
    joined = machine.join(controller.invite("stranger"))
    assert joined.returncode == 0, joined.stderr
    stranger = ec.generate_private_key(ec.SECP384R1())
    (machine.folder / "node/supernode.key").write_bytes(
        stranger.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    machine.start_supernode()
    assert machine.processes["supernode"].wait(PATIENCE_SECONDS) != 0
    assert "Failed to initialize the connection to the SuperLink" in machine.log("supernode")
    with machine.fleet() as client:
        public = public_key_to_bytes(stranger.public_key())
        with pytest.raises(httpx.HTTPStatusError) as refused:
            client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30))
        assert refused.value.response.status_code in range(400, 500)
        with pytest.raises(httpx.HTTPStatusError, match="404"):  # it cannot register itself
            client.RegisterNode(RegisterNodeFleetRequest(public_key=public))


def test_a_key_cannot_speak_for_another_node(controller, nodes):
    listed = json.loads(controller.run("node", "list", "--json").stdout)
    other = next(int(row["node_id"]) for row in listed if row["name"] == "edge-1")
    with nodes[0].fleet() as client, pytest.raises(httpx.HTTPStatusError, match="401"):
        client.PullMessages(PullMessagesRequest(node=Node(node_id=other)))


def test_a_gateway_of_another_authority_is_refused(controller, nodes, machine):
    invitation = controller.invite("careful")
    made = machine.run("certs", "controller", "--name", "localhost", "--folder", "other")
    assert made.returncode == 0, made.stderr
    joined = machine.join(invitation)
    assert joined.returncode == 0, joined.stderr
    machine.start_supernode(ca=machine.folder / "other/ca.pem")
    assert machine.processes["supernode"].wait(PATIENCE_SECONDS) != 0
    assert "CERTIFICATE_VERIFY_FAILED" in machine.log("supernode").upper()


def test_an_invitation_to_an_impostor_is_kept(controller, nodes, machine):
    """The gateway's address is somebody else's now; the secret stays with the node."""

    assert (
        machine.run("certs", "controller", "--name", "localhost", "--folder", "x").returncode == 0
    )
    packed = controller.invite("trusting").strip().removeprefix("icosfl1.")
    facts = json.loads(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)))
    pem = (machine.folder / "x/ca.pem").read_text()
    facts["authority"] = base64.b64encode(ssl.PEM_cert_to_DER_cert(pem)).decode()
    changed = "icosfl1." + base64.urlsafe_b64encode(json.dumps(facts).encode()).decode()
    refused = machine.join(changed)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert (
        f"icos-fl: the gateway at {controller.gateway} is not the one that the invitation is for: "
        in refused.stderr
    )
    assert controller.states()["trusting"] == "invited"


def test_joining_twice_is_the_same_node_and_with_another_key_refused(
    controller, nodes, machine, tmp_path_factory
):
    invitation = controller.invite("once")
    first, again = machine.join(invitation), machine.join(invitation)
    assert (first.returncode, first.stdout) == (again.returncode, again.stdout)
    assert first.returncode == 0
    other = NodeMachine(tmp_path_factory.mktemp("other")).join(invitation)
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr == (
        "icos-fl: the invitation of once was used by another key and is good for one; ask for "
        "another: icos-fl node invite once, at the controller "
        f"({controller.gateway}: invitation-used)\n"
    )


def test_a_clock_that_is_off_is_told(controller, nodes, machine):
    shifted = (
        "import time; now = time.time; time.time = lambda: now() + 600; "
        "from icos_fl_local.__main__ import main; main()"
    )
    invitation = controller.invite("late")
    refused = machine.run("node", "join", "-", given=invitation, program=("-c", shifted))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "the node's clock is 600 s ahead of the controller's" in refused.stderr


def test_a_removed_node_is_out_at_once_and_for_good(controller, nodes, machine):
    assert machine.join(controller.invite("leaves")).returncode == 0
    machine.start_supernode(7)
    machine.wait_until(lambda: controller.states()["leaves"] == "online", "supernode")
    began = time.monotonic()
    removed = controller.run("node", "remove", "leaves")
    assert removed.returncode == 0, removed.stderr
    assert "leaves" not in controller.states()
    machine.processes["supernode"].wait(PATIENCE_SECONDS)
    print(f"\nits SuperNode ended {time.monotonic() - began:.1f} s after the word")
    machine.start_supernode(7)
    assert machine.processes["supernode"].wait(PATIENCE_SECONDS) != 0
    assert "Failed to initialize the connection" in machine.log("supernode")
    assert controller.train(rounds=1, timeout=120.0).replied() == [[0, 1]]


def test_who_tries_often_is_slowed_down(controller, nodes, machine):
    """The last one: it uses up what this address may ask."""
    invitation = controller.invite("eager")
    url = f"https://{controller.gateway}/enrol"
    over = threading.Event()
    statuses: list[int] = []

    def try_often() -> None:
        with httpx.Client(verify=ssl.create_default_context(cafile=controller.ca)) as client:
            statuses.append(client.post(url, content="x" * 5000).status_code)
            while not over.is_set():
                statuses.append(client.post(url, content="{}").status_code)

    trying = threading.Thread(target=try_often)
    trying.start()
    try:
        controller.wait_until(lambda: 429 in statuses)
        refused = machine.join(invitation)
    finally:
        over.set()
        trying.join()
    assert set(statuses) == {413, 400, 429}
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"icos-fl: the gateway at {controller.gateway} is asked too often: wait a minute\n"
    )
