"""TLS, node keys, a database, SuperExecs of their own with a secret: as a deployment has it."""

import secrets
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from icos_fl_service.testing import free_port

ACCEPTED_SECONDS_MAX = 30
"""Of a busy machine, on which a SuperNode has to start. Flower refuses its key for up to 60 s."""

ACCEPTED = "SuperNode ID:"


def node_key(folder: Path, number: int) -> tuple[Path, Path]:
    """As ``ssh-keygen -t ecdsa -b 384`` makes them."""
    key = ec.generate_private_key(ec.SECP384R1())
    private, public = folder / f"node-{number}", folder / f"node-{number}.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    private.chmod(0o600)
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    )
    return private, public


class Secure:
    """A federation in which every part is a process of its own that must prove who it is."""

    def __init__(self, new_federation, folder: Path) -> None:
        self._authority = trustme.CA()
        self._authority.cert_pem.write_to_path(folder / "ca.pem")
        (folder / "secret").write_text(secrets.token_hex(32))
        self.folder = folder
        self.issue()
        self.ports = {number: free_port() for number in (0, 1)}
        self._tls = (
            *("--ssl-certfile", str(folder / "server.pem")),
            *("--ssl-keyfile", str(folder / "server.key")),
            *("--ssl-ca-certfile", str(folder / "ca.pem")),
        )
        self._secret = ("--superexec-auth-secret-file", str(folder / "secret"))
        self._isolated = ("--isolation", "process", *self._secret)
        told = ("superlink", "superexec-link", "supernode-0", "superexec-0")
        self.federation = new_federation(
            tls=self._tls, ca=folder / "ca.pem", metrics={name: free_port() for name in told}
        )
        self._keys = {number: node_key(folder, number) for number in self.ports}

    def issue(self) -> None:
        """A new certificate in the servers' files."""
        issued = self._authority.issue_cert("localhost", "127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(self.folder / "server.pem")
        issued.private_key_pem.write_to_path(self.folder / "server.key")

    def start(self) -> None:
        self.superlink()
        self.superexec("superexec-link", self.federation.port)
        for number, (_, public) in self._keys.items():
            self.federation.flwr("supernode", "register", str(public), "local")
            self.supernode(number)
            self.superexec(f"superexec-{number}", self.ports[number])

    def superlink(self) -> psutil.Process:
        database = self.folder / "superlink.db"
        return self.federation.superlink(
            "--enable-supernode-auth", "--database", str(database), *self._isolated
        )

    def supernode(self, number: int, wait: bool = True) -> psutil.Process:
        key = str(self._keys[number][0])
        return self.federation.supernode(
            number,
            *("--auth-supernode-private-key", key, *self._tls, *self._isolated),
            port=self.ports[number],
            wait=wait,
        )

    def superexec(self, name: str, port: int) -> psutil.Process:
        return self.federation.superexec(name, port, *self.federation.trust, *self._secret)

    def node_superexec(self, number: int) -> psutil.Process:
        return self.superexec(f"superexec-{number}", self.ports[number])


@pytest.fixture(scope="module")
def secure(new_federation, tmp_path_factory) -> Secure:
    secure = Secure(new_federation, tmp_path_factory.mktemp("keys"))
    secure.start()
    return secure


def test_a_run_completes(secure):
    facts = secure.federation.run({3: {"fault": "exits-3", "node": 1}}, rounds=4).end(120)
    print("\nrounds:", [round(fact["seconds"], 2) for fact in facts])
    assert [fact["replied"] for fact in facts] == [[0, 1], [0, 1], [0], [0, 1]]
    assert "exit status 3" in facts[2]["errors"]["1"]
    for number in (0, 1):  # forked, not started
        assert secure.federation.workers(f"superexec-{number}")


def test_a_superexec_that_ends_in_mid_task_leaves_nothing_and_another_takes_over(secure):
    federation = secure.federation
    run = federation.run({2: {"fault": "waits", "node": 1, "timeout": 60}}, rounds=3)
    task = run.task(2)
    started = federation.tree("superexec-1")
    assert task in started
    federation.processes["superexec-1"].terminate()
    failed = run.round(2)
    print(f"\nround: {failed['seconds']:.1f} s, {failed['errors']}")
    assert (failed["replied"], list(failed["errors"])) == ([0], ["1"])
    _, left = psutil.wait_procs(started, 15)
    assert not left
    assert "Traceback" not in federation.log("superexec-1")
    secure.node_superexec(1)
    assert run.round(3)["replied"] == [0, 1]
    run.end()


def test_a_superlink_killed_in_mid_run_and_restarted_completes_the_run(secure, wait_until):
    federation = secure.federation
    run = federation.run({2: {"fault": "waits", "node": 1}}, rounds=4)
    run.task(2)
    federation.processes["superlink"].kill()
    federation.processes["superlink"].wait()
    killed = time.monotonic()
    for name in ("superexec-link", "supernode-0"):
        wait_until(lambda name=name: federation.status(name)["waits_for"], 30, federation.logs)
        found = federation.status(name)
        assert (found["health"], "superlink" in found["waits_for"]) == ("waiting", True)
    (run.folder / "go-2").touch()
    secure.superlink()
    facts = run.end(180)
    print(f"\ncompleted {time.monotonic() - killed:.1f} s after; a round:", facts[1]["seconds"])
    assert [fact["replied"] for fact in facts] == [[0, 1]] * 4
    wait_until(lambda: run.status() == "finished:completed", 30, federation.logs)

    def are_well():
        return all(federation.status(name)["health"] == "healthy" for name in federation.metrics)

    wait_until(are_well, 40, federation.logs)  # a SuperExec asks again after 20 s at most
    assert federation.status("superlink")["run"]["state"] == "finished:completed"


def test_a_renewed_certificate_is_shown_after_sighup_and_a_broken_one_never(secure, wait_until):
    federation, folder = secure.federation, secure.folder
    processes = {"superlink": federation.port, "supernode-0": secure.ports[0]}
    run = federation.run({2: {"hold": True}}, rounds=3)
    run.round(1)
    key = (folder / "server.key").read_bytes()

    def shown(port: int) -> bytes:
        pem = ssl.get_server_certificate(("127.0.0.1", port), ca_certs=str(folder / "ca.pem"))
        return ssl.PEM_cert_to_DER_cert(pem)

    def told(text: str) -> bool:
        for name in processes:
            federation.processes[name].send_signal(signal.SIGHUP)
        return all(text in federation.log(name) for name in processes)

    old = {port: shown(port) for port in processes.values()}
    secure.issue()
    (folder / "server.key").write_bytes(key)  # does not fit
    wait_until(lambda: told("The old certificate goes on"), 10, federation.logs)
    assert {port: shown(port) for port in processes.values()} == old
    secure.issue()
    new = ssl.PEM_cert_to_DER_cert((folder / "server.pem").read_text())
    wait_until(lambda: told("New connections get the certificate"), 10, federation.logs)
    assert {port: shown(port) for port in processes.values()} == dict.fromkeys(old, new)
    run.let_go(2)
    assert [fact["replied"] for fact in run.end()] == [[0, 1]] * 3


@pytest.mark.parametrize(
    "kills", [1, pytest.param(5, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_a_supernode_killed_in_a_round_and_restarted_at_once_takes_part_again(
    secure, wait_until, kills
):
    """By itself: no supervisor starts it a second time."""
    federation = secure.federation
    number = 1
    for _ in range(kills):
        killed_in = {"fault": "waits", "node": number, "timeout": 4, "ttl": 4}
        run = federation.run({1: {"timeout": 120}, 2: killed_in, 3: {"hold": True}}, rounds=3)
        assert run.round(1, 150)["replied"] == [0, 1]
        run.task(2)
        accepted = federation.log(f"supernode-{number}").count(ACCEPTED)
        federation.processes[f"supernode-{number}"].kill()
        federation.processes[f"supernode-{number}"].wait()
        killed = time.monotonic()
        secure.supernode(number)

        def is_back(before=accepted):
            return federation.log(f"supernode-{number}").count(ACCEPTED) > before

        assert run.round(2)["replied"] == [0]
        wait_until(is_back, ACCEPTED_SECONDS_MAX, federation.logs)
        seconds = time.monotonic() - killed
        run.let_go(3)
        assert run.round(3)["replied"] == [0, 1]
        run.end()
        print(
            f"\naccepted {seconds:.1f} s after, took part {time.monotonic() - killed:.1f} s after"
        )
        assert federation.processes[f"supernode-{number}"].poll() is None


def test_a_superlink_without_certificates_needs_the_word_insecure():
    done = subprocess.run(
        [sys.executable, "-m", "icos_fl_warm_runtime", "superlink", "--host", "127.0.0.1"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Certificates are required unless running in insecure mode" in done.stderr
