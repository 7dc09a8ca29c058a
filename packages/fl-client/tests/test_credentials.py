"""How a node calls its processor: TLS, a certificate, a token; and how a refusal is told."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import trustme
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc
from icos_fl_client.credentials import Credentials
from icos_fl_client.errors import ConfigError, ProcessorUnavailable
from icos_fl_client.processor_client import ProcessorClient
from icos_fl_service.security import (
    Security,
    TlsSettings,
    TokenCheck,
    grpc_credentials,
    load_security,
)

SERVICE = "icos_fl.processor.v1.ProcessorService"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Of a processor, of a node that may call it, and of another authority."""
    authority, clients, others = trustme.CA(), trustme.CA(), trustme.CA()
    for name, issued in (
        ("server", authority.issue_cert("localhost")),
        ("client", clients.issue_cert("fl-client")),
        ("stranger", others.issue_cert("fl-client")),
    ):
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    clients.cert_pem.write_to_path(tmp_path / "clients.pem")
    others.cert_pem.write_to_path(tmp_path / "others.pem")
    (tmp_path / "token").write_text("a-token-of-some-length\n")
    (tmp_path / "wrong-token").write_text("another-token-of-some-length\n")
    for secret in (*tmp_path.glob("*.key"), *tmp_path.glob("*token")):
        secret.chmod(0o600)
    return tmp_path


@pytest.fixture
def serve(windows) -> Iterator[Callable[[Security], str]]:
    """Serves *windows* to whom a Security lets in, and gives the address."""
    started = []

    def start(security: Security) -> str:
        server = grpc.server(
            ThreadPoolExecutor(4), interceptors=[TokenCheck(SERVICE, lambda: security)]
        )
        pb_grpc.add_ProcessorServiceServicer_to_server(windows, server)
        credentials = grpc_credentials(lambda: security)
        port = (
            server.add_secure_port("127.0.0.1:0", credentials)
            if credentials
            else server.add_insecure_port("127.0.0.1:0")
        )
        server.start()
        started.append(server)
        return f"localhost:{port}"

    yield start
    for server in started:
        stopped: threading.Event = server.stop(0)
        stopped.wait()


def secured(files: Path, *, mutual: bool = True) -> Security:
    tls = TlsSettings(
        certificate=files / "server.pem",
        key=files / "server.key",
        client_ca=files / "clients.pem" if mutual else None,
    )
    return load_security(tls, files / "token")


def credentials(files: Path, **changes: str | None) -> Credentials:
    """The right ones, changed as told."""
    right = {
        "ca": "ca.pem",
        "certificate": "client.pem",
        "key": "client.key",
        "token": "token",
    }
    named = {key: name for key, name in (right | changes).items() if name}
    return Credentials(**{key: files / name for key, name in named.items()})


def refusal(address: str, shown: Credentials, **options) -> str:
    with (
        ProcessorClient(address, credentials=shown, **options) as client,
        pytest.raises(ProcessorUnavailable) as refused,
    ):
        client.nodes()
    return str(refused.value)


def test_a_node_with_certificate_and_token_is_served(serve, files):
    address = serve(secured(files))
    with ProcessorClient(address, credentials=credentials(files)) as client:
        assert client.nodes() == []


def test_a_token_alone_goes_without_tls(serve, files):
    address = serve(load_security(TlsSettings(), files / "token"))
    shown = credentials(files, ca=None, certificate=None, key=None)
    with ProcessorClient(address, credentials=shown) as client:
        assert client.nodes() == []


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("wrong-token", "UNAUTHENTICATED: the bearer token is not known"),
        (None, "UNAUTHENTICATED: an authorization header with a bearer token is needed"),
    ],
)
def test_a_wrong_token_is_named(serve, files, token, said):
    assert refusal(serve(secured(files)), credentials(files, token=token)).endswith(said)


@pytest.mark.parametrize("wait_for_ready", [True, False])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ca": "others.pem"}, "its certificate is not what {}/others.pem says: unable to get"),
        (
            {"certificate": "stranger.pem", "key": "stranger.key"},
            "it refuses the certificate {}/stranger.pem",
        ),
        (
            {"certificate": None, "key": None},
            "it asks for a client's certificate, and there is no processor-certificate",
        ),
        (
            {"ca": None, "certificate": None, "key": None},
            "it asks for TLS, and there is no processor-ca",
        ),
    ],
)
def test_what_keeps_a_connection_from_coming_about_is_named(
    serve, files, changes, said, wait_for_ready
):
    address = serve(secured(files))
    told = refusal(
        address,
        credentials(files, **changes),
        deadline_seconds=1,
        wait_for_ready=wait_for_ready,
    )
    assert told.startswith(f"the processor at {address}: ")
    assert said.format(files) in told


def test_a_certificate_for_another_name_is_named(serve, files):
    address = serve(secured(files)).replace("localhost", "127.0.0.1")
    told = refusal(address, credentials(files), wait_for_ready=False)
    assert "IP address mismatch, certificate is not valid for '127.0.0.1'" in told


def test_a_processor_without_tls_is_named_to_a_node_that_wants_it(serve, files):
    address = serve(Security())
    told = refusal(address, credentials(files), wait_for_ready=False)
    assert told.rpartition("; ")[2].startswith("TLS with it fails: ")


def test_a_processor_that_is_not_ready_is_no_matter_of_certificates(serve, files, windows):
    windows.failure = (grpc.StatusCode.UNAVAILABLE, "the store does not answer")
    address = serve(secured(files))
    told = refusal(address, credentials(files), wait_for_ready=False)
    assert told == f"the processor at {address}: UNAVAILABLE: the store does not answer"


def test_renewed_files_are_taken_by_the_next_connection(serve, files):
    address = serve(secured(files))
    shown = credentials(files, token="wrong-token")
    refusal(address, shown)
    (files / "wrong-token").write_text("a-token-of-some-length")
    with ProcessorClient(address, credentials=shown) as client:
        assert client.nodes() == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ca": "a", "certificate": "a"}, "processor-certificate and processor-key need each"),
        ({"ca": "a", "key": "a"}, "processor-certificate and processor-key need each other"),
        ({"certificate": "a", "key": "a"}, "processor-certificate needs processor-ca"),
    ],
    ids=str,
)
def test_a_part_of_the_files_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        Credentials(**{key: Path(name) for key, name in given.items()})


@pytest.mark.parametrize(("name", "what"), [("client.key", "key"), ("token", "token")])
def test_a_secret_that_others_may_read_is_refused_unread(files, name, what):
    (files / name).chmod(0o644)
    with pytest.raises(ConfigError, match=f"{name}: others may read or write it; chmod o= "):
        ProcessorClient("localhost:1", credentials=credentials(files))


def test_a_file_that_is_not_there_is_named(files):
    with pytest.raises(ConfigError, match="gone: cannot be read: No such file"):
        ProcessorClient("localhost:1", credentials=credentials(files, ca="gone"))


def test_a_file_of_several_tokens_is_refused_without_telling_one(files):
    (files / "token").write_text("a-token-of-some-length\nanother-token\n")
    with pytest.raises(ConfigError) as refused:
        ProcessorClient("localhost:1", credentials=credentials(files))
    assert str(refused.value) == f"{files}/token: more than one token, or one that is not ASCII"


def test_files_that_vanish_meanwhile_hide_no_other_cause(serve, files, windows):
    windows.failure = (grpc.StatusCode.UNAVAILABLE, "the store does not answer")
    address = serve(secured(files))
    with ProcessorClient(address, credentials=credentials(files)) as client:
        (files / "client.pem").unlink()
        with pytest.raises(ProcessorUnavailable, match=r"the store does not answer$"):
            client.nodes()
