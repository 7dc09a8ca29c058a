"""The enrolment service and its commands, with a real SuperLink behind them."""

import base64
import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from icos_fl_server.enrolment.invitations import Invitations
from icos_fl_server.enrolment.superlink import SuperLink
from icos_fl_server.page.service import Members, Page
from icos_fl_service.security import Security
from icos_fl_service.testing import WebClient, free_port

HOST = "127.0.0.1"
GATEWAY = "fl.example.org:8443"


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((HOST, port), 1).close()
        return True
    return False


def new_key(kind: Any = ec.SECP384R1) -> str:
    """A public key as a node sends it."""
    key: Any = kind.generate() if kind is ed25519.Ed25519PrivateKey else None
    key = key or ec.generate_private_key(kind())
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        .decode()
    )


@dataclass
class Controller:
    """A SuperLink and its enrolment service, as processes."""

    folder: Path
    authority: trustme.CA
    superlink_port: int
    port: int
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    def issue(self, name: str) -> None:
        issued = self.authority.issue_cert("localhost", HOST)
        issued.cert_chain_pems[0].write_to_path(self.folder / f"{name}.pem")
        issued.private_key_pem.write_to_path(self.folder / f"{name}.key")

    @property
    def env(self) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if "FLWR" not in name}
        return mine | {
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "ICOS_FL_ENROLMENT_FOLDER": str(self.folder / "invitations"),
            "ICOS_FL_ENROLMENT_GATEWAY": GATEWAY,
            "ICOS_FL_ENROLMENT_SUPERLINK": f"localhost:{self.superlink_port}",
            "ICOS_FL_ENROLMENT_AUTHORITY": str(self.folder / "ca.pem"),
            "ICOS_FL_ENROLMENT_CERTIFICATE": str(self.folder / "enrolment.pem"),
            "ICOS_FL_ENROLMENT_KEY": str(self.folder / "enrolment.key"),
            "ICOS_FL_ENROLMENT_LISTEN_ADDRESS": f"{HOST}:{self.port}",
        }

    @contextlib.contextmanager
    def process(self, name: str, port: int, *command: str) -> Iterator[subprocess.Popen]:
        log = self.folder / f"{name}.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], env=self.env, stdout=stream, stderr=stream
            )
        self.processes[name] = process
        try:
            wait_until(lambda: listens(port), process, log)
            yield process
        finally:
            process.terminate()
            process.wait(60)

    def superlink(self) -> contextlib.AbstractContextManager[subprocess.Popen]:
        tls = [
            *("--ssl-certfile", str(self.folder / "superlink.pem")),
            *("--ssl-keyfile", str(self.folder / "superlink.key")),
            *("--ssl-ca-certfile", str(self.folder / "ca.pem")),
        ]
        (self.folder / "secret").write_text("0" * 64)
        return self.process(
            "superlink", self.superlink_port, "icos_fl_warm_runtime", "superlink",
            *tls, "--host", HOST, "--port", str(self.superlink_port),
            "--enable-supernode-auth", "--database", str(self.folder / "superlink.db"),
            "--isolation", "process", "--superexec-auth-secret-file", str(self.folder / "secret"),
        )  # fmt: skip

    def enrolment(self) -> contextlib.AbstractContextManager[subprocess.Popen]:
        return self.process("enrolment", self.port, "icos_fl_server", "enrolment")

    def node(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``icos-fl-server node``"""
        return subprocess.run(
            [sys.executable, "-m", "icos_fl_server", "node", *arguments],
            env=self.env, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def invite(self, name: str, hours: float = 1) -> dict[str, str]:
        """A node's name and the secret by which it joins."""
        kept = Invitations(self.folder / "invitations")
        with kept.locked():
            return {"name": name, "secret": kept.invite(name, hours * 3600)[0]}

    def post(self, body: str | bytes, path: str = "/enrol") -> tuple[int, Any]:
        context = ssl.create_default_context(cafile=self.folder / "ca.pem")
        connection = http.client.HTTPSConnection(
            "localhost", self.port, timeout=60, context=context
        )
        with contextlib.closing(connection):
            connection.request("POST", path, body)
            answer = connection.getresponse()
            text = answer.read().decode()
        return answer.status, json.loads(text) if text.startswith("{") else text

    def enrol(self, invitation: dict[str, Any], key: str, **changed: Any) -> tuple[int, Any]:
        body = {
            "name": invitation["name"],
            "secret": invitation["secret"],
            "public_key": key,
            "time_unix_s": time.time(),
        }
        return self.post(json.dumps(body | changed))

    def refusal(self, *arguments: Any, **changed: Any) -> tuple[int, str]:
        status, answer = self.enrol(*arguments, **changed)
        return status, answer["error"]

    def listed(self) -> dict[str, dict[str, str]]:
        """What ``node list`` tells, by name."""
        done = self.node("list", "--json")
        assert done.returncode == 0, done.stderr
        return {row["name"]: row for row in json.loads(done.stdout)}


def new_controller(folder: Path) -> Controller:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    controller = Controller(folder, authority, free_port(), free_port())
    controller.issue("superlink")
    controller.issue("enrolment")
    return controller


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    controller = new_controller(tmp_path_factory.mktemp("controller"))
    with controller.superlink(), controller.enrolment():
        yield controller


def test_an_invitation_has_all_that_a_node_needs_and_keeps_its_secret_to_itself(controller):
    before = time.time()
    done = controller.node("invite", "a", "--hours", "2")
    assert "for a, once, until " in done.stderr
    packed = done.stdout.strip().removeprefix("icosfl1.")
    invitation = json.loads(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)))
    assert (invitation["gateway"], invitation["name"]) == (GATEWAY, "a")
    assert before - 1 <= invitation["expires_unix_s"] - 7200 <= time.time()
    pem = (controller.folder / "ca.pem").read_text()
    assert base64.b64decode(invitation["authority"]) == ssl.PEM_cert_to_DER_cert(pem)
    assert len(base64.urlsafe_b64decode(invitation["secret"] + "=")) == 32
    kept = [path.read_text() for path in (controller.folder / "invitations").iterdir()]
    assert not [text for text in kept if invitation["secret"] in text]


def test_a_node_that_was_invited_is_registered_by_its_name_and_key(controller):
    key = new_key()
    status, answer = controller.enrol(controller.invite("b"), key)
    node = controller.listed()["b"]
    assert (status, answer) == (
        200,
        {"name": "b", "node_id": node["node_id"], "superlink": GATEWAY},
    )
    assert node["state"] == "registered"
    public = controller.folder / "b.pub"
    public.write_text(key)
    told = subprocess.run(["ssh-keygen", "-l", "-f", public], capture_output=True, text=True)
    assert node["key"] == told.stdout.split()[1]


def test_a_node_is_on_the_controllers_page_before_its_first_run(controller, tmp_path):
    status, answer = controller.enrol(controller.invite("newcomer"), new_key())
    assert status == 200
    superlink = SuperLink(f"localhost:{controller.superlink_port}", controller.folder / "ca.pem")
    members = Members(superlink)
    page = Page(f"{HOST}:0", tmp_path, members, Security())
    client = WebClient(page.port)
    with contextlib.closing(members), contextlib.closing(page):
        deadline = time.monotonic() + 60
        while (told := client.json("/api/run"))["superlink"]["problem"]:
            assert time.monotonic() < deadline, told
            time.sleep(0.05)
    (node,) = (each for each in told["nodes"] if each["name"] == "newcomer")
    assert (node["id"], node["online"]["state"]) == (answer["node_id"], "registered")


def test_the_same_node_may_ask_again_and_is_told_the_same(controller):
    key, invitation = new_key(), controller.invite("c")
    first = controller.enrol(invitation, key)
    assert controller.enrol(invitation, f"{key} a-comment") == first
    assert first[0] == 200


def test_another_key_cannot_use_what_was_used(controller):
    invitation = controller.invite("d")
    assert controller.enrol(invitation, new_key())[0] == 200
    status, answer = controller.enrol(invitation, new_key())
    assert (status, answer["error"]) == (409, "invitation-used")
    assert "the invitation of d was used by another key" in answer["message"]


def test_of_many_at_once_with_one_invitation_one_gets_in(controller):
    invitation = controller.invite("e")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: controller.enrol(invitation, new_key())[0], range(8)))
    assert sorted(answers) == [200] + [409] * 7


def test_a_guess_and_a_name_that_nobody_has_are_told_the_same(controller):
    invitation = controller.invite("f")
    guess = controller.enrol(invitation, new_key(), secret="guess")
    assert guess == controller.enrol(invitation, new_key(), name="nobody")
    assert (guess[0], guess[1]["error"]) == (403, "invitation-unknown")
    outside = controller.enrol(invitation, new_key(), name="../../etc/passwd")
    assert outside == guess


def test_an_expired_invitation_is_told_to_who_has_its_secret(controller):
    invitation = controller.invite("g", hours=1e-9)
    assert controller.refusal(invitation, new_key()) == (403, "invitation-expired")


def test_a_newer_invitation_takes_the_olders_place(controller):
    old, new = controller.invite("h"), controller.invite("h")
    key = new_key()
    assert controller.refusal(old, key) == (403, "invitation-unknown")
    assert controller.enrol(new, key)[0] == 200


@pytest.mark.parametrize(("off", "word"), [(6.0, "ahead of"), (-301.0, "behind")])
def test_a_clock_that_flower_would_refuse_is_told_and_the_invitation_stays_good(
    controller, off: float, word: str
):
    key, invitation = new_key(), controller.invite(f"i{off}".replace("-", "m"))
    status, answer = controller.enrol(invitation, key, time_unix_s=time.time() + off)
    assert (status, answer["error"]) == (409, "clock-off")
    assert f"s {word} the controller's" in answer["message"]
    assert controller.enrol(invitation, new_key())[0] == 200


@pytest.mark.parametrize(
    "key",
    ["", "nonsense", new_key(ec.SECP256R1), new_key(ed25519.Ed25519PrivateKey), new_key()[:80]],
    ids=["none", "nonsense", "p256", "ed25519", "cut"],
)
def test_only_a_key_of_p384_joins(controller, key: str):
    assert controller.refusal(controller.invite("j"), key) == (400, "key-unusable")


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ("", 400, "request-unusable"),
        ("[]", 400, "request-unusable"),
        ('{"name": "a"}', 400, "request-unusable"),
        (
            '{"name": 1, "secret": "s", "public_key": "k", "time_unix_s": 1}',
            400,
            "request-unusable",
        ),
        (b"\xff\xfe", 400, "request-unusable"),
        ("x" * 4097, 413, "request-too-large"),
    ],
    ids=["empty", "list", "part", "type", "bytes", "large"],
)
def test_what_is_no_request_is_refused_by_name(controller, body, status: int, error: str):
    answered, answer = controller.post(body)
    assert (answered, answer["error"]) == (status, error)


def test_there_is_nothing_else_to_ask(controller):
    assert [controller.post("", path)[0] for path in ("/", "/docs", "/enrol/x")] == [404] * 3


def test_a_name_and_a_key_are_one_nodes_alone(controller):
    key = new_key()
    assert controller.enrol(controller.invite("k"), key)[0] == 200
    refused = controller.node("invite", "k")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "a node is registered as k" in refused.stderr
    other = controller.invite("l")
    assert controller.refusal(other, key) == (409, "key-in-use")
    assert controller.enrol(other, new_key())[0] == 200  # it is still good


def test_who_was_removed_is_gone_and_comes_back_with_another_key_alone(controller):
    key = new_key()
    assert controller.enrol(controller.invite("m"), key)[0] == 200
    removed = controller.node("remove", "m")
    assert (removed.returncode, removed.stdout[:10]) == (0, "removed m:")
    assert "m" not in controller.listed()
    again = controller.invite("m")
    assert controller.refusal(again, key) == (409, "key-removed")
    assert controller.enrol(again, new_key())[0] == 200


def test_an_invitation_is_listed_and_withdrawn(controller):
    invitation = controller.invite("n")
    assert controller.listed()["n"]["state"] == "invited"
    assert controller.node("remove", "n").stdout == "withdrew the invitation of n\n"
    assert "n" not in controller.listed()
    assert controller.refusal(invitation, new_key()) == (403, "invitation-unknown")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["remove", "nobody"], "no node 'nobody', and no invitation for it; there are: "),
        (["invite", "../up"], "name '../up'; it must be 1 to 200 letters"),
        (["invite", "x", "--hours", "0"], "--hours 0: above 0 and at most 8,760"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(controller, arguments: list[str], said: str):
    done = controller.node(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_no_secret_is_in_a_log_or_kept(controller):
    invitation = controller.invite("silent-1")
    assert controller.refusal(invitation | {"name": "silent-2"}, new_key())[0] == 403
    assert controller.post(f"no JSON, and {invitation['secret']}")[0] == 400
    assert controller.enrol(invitation, new_key())[0] == 200
    assert controller.refusal(invitation, new_key())[0] == 409
    files = [path for path in controller.folder.rglob("*") if path.is_file()]
    assert {"enrolment.log", "superlink.log", "superlink.db"} < {path.name for path in files}
    for path in files:
        assert invitation["secret"].encode() not in path.read_bytes(), path
        if path.suffix == ".log":
            assert b"0" * 64 not in path.read_bytes()  # what SuperExecs show to the SuperLink


def test_while_the_superlink_is_away_a_node_is_told_and_gets_in_later(tmp_path: Path):
    controller = new_controller(tmp_path)
    key = new_key()
    with controller.superlink():
        invitation = controller.invite("a")
    invite = controller.node("invite", "b")
    assert invite.returncode == 1
    assert f"the SuperLink at localhost:{controller.superlink_port}" in invite.stderr
    with controller.enrolment() as process:
        assert controller.refusal(invitation, key) == (503, "superlink-away")
        with controller.superlink():
            assert controller.enrol(invitation, key)[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_renewed_certificate_is_taken_over(controller):
    def shown() -> str:
        return ssl.get_server_certificate((HOST, controller.port))

    old = shown()
    controller.issue("enrolment")
    log = controller.folder / "enrolment.log"
    controller.processes["enrolment"].send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 30
    while shown() == old:
        assert time.monotonic() < deadline, log.read_text()
    assert shown() == (controller.folder / "enrolment.pem").read_text()


@pytest.mark.parametrize("what", [["invite", "edge-1"], ["list"], ["remove", "edge-1"]])
def test_an_authority_that_cannot_be_read_is_named_with_its_setting(tmp_path: Path, what) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "icos_fl_server", "node", *what],
        env=os.environ | {"ICOS_FL_ENROLMENT_GATEWAY": GATEWAY},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "icos-fl-server: ICOS_FL_ENROLMENT_AUTHORITY: certs/ca.pem: cannot be read: No such file"
    )
    assert not [*tmp_path.iterdir()]
