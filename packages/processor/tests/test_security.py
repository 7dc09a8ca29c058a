"""TLS, mTLS and tokens of the processor, and their renewal, over real gRPC."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc
from icos_fl_service.security import Security, TlsSettings, load_security
from prometheus_client import REGISTRY

TOKEN, OTHER_TOKEN = "a-token-of-some-length", "another-token-of-some-length"
UNAUTHENTICATED, UNAVAILABLE = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE


class Node:
    """Authorities of a node, and what they have signed, in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority, self.clients = trustme.CA(), trustme.CA()
        self.client = self.clients.issue_cert("fl-client")
        self.clients.cert_pem.write_to_path(folder / "clients.pem")
        self.renew()
        self.accept(TOKEN)

    def renew(self) -> None:
        """A new certificate and key of the processor, as one would put them there."""
        issued = self.authority.issue_cert("localhost")
        for name, pem in (
            ("server.pem", issued.cert_chain_pems[0]),
            ("server.key", issued.private_key_pem),
        ):
            (self.folder / name).unlink(missing_ok=True)
            pem.write_to_path(self.folder / name)
            (self.folder / name).chmod(0o600)

    def accept(self, *tokens: str) -> None:
        (self.folder / "tokens").write_text("\n".join(tokens))
        (self.folder / "tokens").chmod(0o600)

    @property
    def files(self) -> dict[str, str]:
        names = {"certificate": "server.pem", "key": "server.key", "client_ca": "clients.pem"}
        return {name: str(self.folder / file) for name, file in names.items()}

    def security(self) -> Security:
        return load_security(TlsSettings(**self.files), self.folder / "tokens")

    def channel(
        self, port: int, root: trustme.CA | None = None, client: trustme.LeafCert | None = None
    ) -> grpc.Channel:
        """A connection of its own."""
        pair = (client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()) if client else ()
        credentials = grpc.ssl_channel_credentials((root or self.authority).cert_pem.bytes(), *pair)
        return grpc.secure_channel(
            f"localhost:{port}", credentials, [("grpc.use_local_subchannel_pool", 1)]
        )


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def nodes(channel: grpc.Channel, token: str = TOKEN, scheme: str = "Bearer") -> list[str]:
    metadata = (("authorization", f"{scheme} {token}"),) if token else ()
    stub: Any = pb_grpc.ProcessorServiceStub(channel)
    return list(stub.ListNodes(pb.ListNodesRequest(), timeout=20, metadata=metadata).nodes)


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value.code(), refused.value.details()


@pytest.fixture
def served(store, run, node) -> Any:
    store.fill("a", {"power": [1.0]})
    running = run(store, security=node.security())
    with node.channel(running.server.port, client=node.client) as channel:
        for answer in health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=20
        ):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                break
    return running


def test_who_shows_certificate_and_token_is_served(served, node):
    with node.channel(served.server.port, client=node.client) as channel:
        assert nodes(channel) == ["a"]


@pytest.mark.parametrize(
    ("token", "scheme", "said"),
    [
        ("", "", "an authorization header with a bearer token is needed"),
        ("YTpi", "Basic", "the authorization header has no bearer token"),
        ("wrong-token-of-some-length", "Bearer", "the bearer token is not known"),
    ],
)
def test_a_wrong_token_is_refused_and_named(served, node, token, scheme, said):
    counted = {"method": "ListNodes", "code": "UNAUTHENTICATED"}
    before = REGISTRY.get_sample_value("icos_fl_grpc_calls_total", counted) or 0
    with node.channel(served.server.port, client=node.client) as channel:
        assert refusal(lambda: nodes(channel, token, scheme)) == (UNAUTHENTICATED, said)
        assert nodes(channel) == ["a"]
    assert REGISTRY.get_sample_value("icos_fl_grpc_calls_total", counted) == before + 1


@pytest.mark.parametrize(
    "method", ["DescribeWindow", "GetSequences", "GetLatest", "WatchWindow", "ListNodes"]
)
def test_no_call_goes_without_a_token(served, node, method):
    with node.channel(served.server.port, client=node.client) as channel:
        call = channel.unary_stream(f"/icos_fl.processor.v1.ProcessorService/{method}")
        assert refusal(lambda: list(call(b"", timeout=20)))[0] == UNAUTHENTICATED


def test_who_is_refused_does_not_keep_a_thread_by_sending_nothing(store, run, node):
    running = run(store, watchers_max=1, security=Security(None, node.security().token_digests))
    running.wait_for_health("SERVING")
    silent = threading.Event()

    def nothing():
        silent.wait()
        yield b""

    call = running.channel.stream_unary("/icos_fl.processor.v1.ProcessorService/ListNodes")
    with ThreadPoolExecutor(40) as pool:
        calls = [pool.submit(call, nothing(), timeout=20) for _ in range(40)]
        assert {refusal(one.result)[0] for one in calls} == {UNAUTHENTICATED}
        silent.set()
    assert nodes(running.channel) == []


def test_a_client_without_the_authoritys_certificate_gets_nowhere(served, node):
    for client in (None, node.authority.issue_cert("fl-client")):
        with node.channel(served.server.port, client=client) as channel:
            assert refusal(lambda: nodes(channel))[0] == UNAVAILABLE


def test_a_client_does_not_talk_to_a_processor_of_another_authority(served, node):
    with node.channel(served.server.port, trustme.CA(), node.client) as channel:
        code, said = refusal(lambda: nodes(channel))
    assert code == UNAVAILABLE
    assert "CERTIFICATE_VERIFY_FAILED" in said


def test_a_client_without_tls_gets_nowhere(served):
    assert refusal(lambda: nodes(served.channel))[0] == UNAVAILABLE


MAIN = """
from icos_fl_processor import __main__
from icos_fl_timeseries_store import MemoryStore
__main__.connect = lambda settings: MemoryStore()
__main__.main()
"""


def wait_for_line(process: subprocess.Popen[str], event: str) -> str:
    """The next line of the log with *event* in it."""
    for line in process.stderr:
        if event in line:
            return line
    raise AssertionError(f"the processor ended and never said {event!r}")


@pytest.fixture
def command(node: Node, monkeypatch):
    """The command as a process, over a store in memory."""
    monkeypatch.setenv("ICOS_FL_PROCESSOR_LISTEN_ADDRESS", "127.0.0.1:0")
    monkeypatch.setenv("ICOS_FL_PROCESSOR_TOKENS", str(node.folder / "tokens"))
    for name, file in node.files.items():
        monkeypatch.setenv(f"ICOS_FL_PROCESSOR_TLS__{name.upper()}", file)
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    yield process
    process.kill()
    process.communicate()


def port_of(process: subprocess.Popen[str]) -> int:
    """Its port, as soon as the store has answered it."""
    lines = [wait_for_line(process, "") for _ in range(2)]  # in either order
    assert any("store answers" in line for line in lines)
    (serving,) = (json.loads(line) for line in lines if '"serving"' in line)
    return int(serving["port"])


def test_certificates_and_tokens_are_renewed_at_sighup_and_no_call_is_lost(command, node):
    port = port_of(command)
    ended = threading.Event()

    def call(always_new: bool) -> int:
        calls = 0
        channel = node.channel(port, client=node.client)
        while not ended.is_set():
            if always_new:
                channel.close()
                channel = node.channel(port, client=node.client)
            assert nodes(channel) == []
            calls += 1
        channel.close()
        return calls

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(call, always_new) for always_new in (False, False, True, True)]
        try:
            for number in range(5):
                node.renew()
                node.accept(TOKEN, f"one-more-token-number-{number}")
                command.send_signal(signal.SIGHUP)
                wait_for_line(command, "new certificates and tokens taken over")
        finally:
            ended.set()
        assert all(caller.result() > 0 for caller in callers)


def test_after_sighup_the_old_authority_and_token_are_refused(command, node):
    port = port_of(command)
    old, old_client = node.authority, node.client
    node.authority, node.clients = trustme.CA(), trustme.CA()
    node.client = node.clients.issue_cert("fl-client")
    node.clients.cert_pem.write_to_path(node.folder / "clients.pem")
    node.renew()
    node.accept(OTHER_TOKEN)
    command.send_signal(signal.SIGHUP)
    wait_for_line(command, "new certificates and tokens taken over")
    with node.channel(port, client=node.client) as channel:
        assert nodes(channel, OTHER_TOKEN) == []
        assert refusal(lambda: nodes(channel)) == (UNAUTHENTICATED, "the bearer token is not known")
    with node.channel(port, client=old_client) as channel:
        assert refusal(lambda: nodes(channel, OTHER_TOKEN))[0] == UNAVAILABLE
    with node.channel(port, old, node.client) as channel:
        assert refusal(lambda: nodes(channel, OTHER_TOKEN))[0] == UNAVAILABLE


def test_what_cannot_be_used_is_refused_at_sighup_and_the_old_goes_on(command, node):
    port = port_of(command)
    (node.folder / "server.key").write_text("no key")
    command.send_signal(signal.SIGHUP)
    line = wait_for_line(command, "refused, the old ones go on")
    assert "server.key are no certificate and its key" in line
    with node.channel(port, client=node.client) as channel:
        assert nodes(channel) == []


def test_an_open_address_without_a_word_is_refused(command, monkeypatch):
    monkeypatch.setenv("ICOS_FL_PROCESSOR_LISTEN_ADDRESS", "0.0.0.0:0")
    monkeypatch.delenv("ICOS_FL_PROCESSOR_TOKENS")
    monkeypatch.delenv("ICOS_FL_PROCESSOR_TLS__CLIENT_CA")
    done = subprocess.run([sys.executable, "-c", MAIN], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "other machines reach 0.0.0.0:0: give TLS__CERTIFICATE" in done.stderr


def test_no_secret_is_in_the_log_at_any_level(node, monkeypatch, command):
    command.kill()  # only its settings are wanted
    monkeypatch.setenv("GRPC_VERBOSITY", "DEBUG")
    log = node.folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN], stderr=stream, stdout=stream, text=True
        )
        try:
            while "store answers" not in log.read_text() or '"serving"' not in log.read_text():
                assert process.poll() is None
                threading.Event().wait(0.05)
            (line,) = (line for line in log.read_text().splitlines() if '"serving"' in line)
            port = json.loads(line)["port"]
            with node.channel(port, client=node.client) as channel:
                assert nodes(channel) == []
                assert refusal(lambda: nodes(channel, OTHER_TOKEN))[0] == UNAUTHENTICATED
            with node.channel(port) as channel:
                assert refusal(lambda: nodes(channel))[0] == UNAVAILABLE
            node.accept(f"{OTHER_TOKEN} in two words")
            process.send_signal(signal.SIGHUP)
            while "refused, the old ones go on" not in log.read_text():
                assert process.poll() is None
                threading.Event().wait(0.05)
        finally:
            process.terminate()
            process.wait(60)
    text = log.read_text()
    key = (node.folder / "server.key").read_text().splitlines()[1]
    assert "Handshake failed" in text  # of gRPC itself: nothing is held back
    for secret in (TOKEN, OTHER_TOKEN, key):
        assert secret not in text
