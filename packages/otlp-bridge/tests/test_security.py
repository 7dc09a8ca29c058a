"""TLS, mTLS and tokens, and their renewal, over both transports."""

import datetime
import ssl
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import trustme
from google.rpc import code_pb2
from icos_fl_otlp_bridge import default_config
from icos_fl_service.security import TlsSettings, load_security
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub

POWER = "scaph_host_power_microwatts"
TOKEN = "a-token-of-some-length"
OTHER_TOKEN = "another-token-of-some-length"


class Files:
    """Certificates and tokens in files, and clients that go with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.clients = trustme.CA()
        self.issue()
        (folder / "clients.pem").write_bytes(self.clients.cert_pem.bytes())

    def issue(self, authority: trustme.CA | None = None, **options: Any) -> None:
        """A new certificate in the server's files."""
        issued = (authority or self.authority).issue_cert("localhost", "127.0.0.1", **options)
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        (self.folder / "server.pem").write_bytes(chain)
        (self.folder / "server.key").write_bytes(issued.private_key_pem.bytes())
        (self.folder / "server.key").chmod(0o600)

    def tls(self, mutual: bool = False) -> TlsSettings:
        return TlsSettings(
            certificate=self.folder / "server.pem",
            key=self.folder / "server.key",
            client_ca=self.folder / "clients.pem" if mutual else None,
        )

    def tokens(self, *tokens: str) -> Path:
        path = self.folder / "tokens"
        path.write_text("# who may export\n\n" + "\n".join(tokens) + "\n")
        path.chmod(0o600)
        return path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def grpc_export(bridge: Any, request: Any, root: bytes, client: Any = None, **call: Any) -> Any:
    """An export over TLS on a connection of its own."""
    pair = (None, None)
    if client is not None:
        pair = (client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes())
    credentials = grpc.ssl_channel_credentials(root, *pair)
    with grpc.secure_channel(f"localhost:{bridge.server.port}", credentials) as channel:
        stub: Any = MetricsServiceStub(channel)
        return stub.Export(request, timeout=10, **call)


def client_context(root: bytes, client: Any = None, folder: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=root.decode())
    if client is not None and folder is not None:
        pem = folder / "client.pem"
        client.private_key_and_cert_chain_pem.write_to_path(pem)
        context.load_cert_chain(pem)
    return context


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (None, "an authorization header with a bearer token is needed"),
        ("Basic YTpi", "the authorization header has no bearer token"),
        ("Bearer wrong-token-of-some-length", "the bearer token is not known"),
    ],
)
def test_who_has_no_token_is_told_so_and_stores_nothing(run, export, files, header, said):
    bridge = run(security=load_security(TlsSettings(), files.tokens(TOKEN)))
    batch = export().gauge(POWER, (0, 1_000_000))
    metadata = (("authorization", header),) if header else None
    error = bridge.refusal(batch, metadata=metadata)
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAUTHENTICATED, said)
    answer = bridge.post(batch, **({"authorization": header} if header else {}))
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert (answer.refusal.code, answer.refusal.message) == (code_pb2.UNAUTHENTICATED, said)
    assert bridge.store.nodes() == []


@pytest.mark.parametrize("token", [TOKEN, OTHER_TOKEN])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_any_token_of_the_file_may_export(run, export, files, token, scheme):
    bridge = run(security=load_security(TlsSettings(), files.tokens(TOKEN, OTHER_TOKEN)))
    header = f"{scheme} {token}"
    bridge.export(export().gauge(POWER, (0, 1_000_000)), metadata=(("authorization", header),))
    assert bridge.post(export().gauge(POWER, (3, 1)), authorization=header).status == 200
    assert sorted(bridge.rows()) == [0, 3]


def test_tokens_are_taken_over(run, export, files):
    bridge = run(security=load_security(TlsSettings(), files.tokens(TOKEN)))
    old, new = ((("authorization", f"Bearer {token}"),) for token in (TOKEN, OTHER_TOKEN))
    batch = export().gauge(POWER, (0, 1_000_000))
    bridge.export(batch, metadata=old)
    security = load_security(TlsSettings(), files.tokens(OTHER_TOKEN))
    bridge.server.take_over(default_config(), security)
    assert bridge.refusal(batch, metadata=old).code() == grpc.StatusCode.UNAUTHENTICATED
    bridge.export(batch, metadata=new)


def start_tls(run: Callable[..., Any], files: Files, mutual: bool = False) -> Any:
    bridge = run(ready=False, security=load_security(files.tls(mutual), None))
    return SimpleNamespace(**vars(bridge), request=bridge.request, rows=bridge.rows)


def wait_for_store(bridge: Any, export: Callable[[], Any]) -> Any:
    """The export's response as soon as the store has answered the bridge."""
    while True:
        try:
            return export()
        except grpc.RpcError as error:
            if "store has not answered yet" not in str(error.details()):
                raise


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])  # the latter names no server
def test_exports_over_tls(run, export, files, host):
    bridge = start_tls(run, files)
    root = files.authority.cert_pem.bytes()
    request = export().gauge(POWER, (0, 1_000_000)).request
    wait_for_store(bridge, lambda: grpc_export(bridge, request, root))
    body = export().gauge(POWER, (3, 1)).request.SerializeToString()
    assert bridge.request(body, tls=client_context(root), host=host).status == 200
    assert sorted(bridge.rows()) == [0, 3]


def test_a_client_without_the_authoritys_certificate_gets_nowhere(run, export, files, tmp_path):
    bridge = start_tls(run, files, mutual=True)
    root = files.authority.cert_pem.bytes()
    request = export().gauge(POWER, (0, 1_000_000)).request
    stranger = files.authority.issue_cert("stranger")
    for client in (None, stranger):
        with pytest.raises(grpc.RpcError) as refused:
            grpc_export(bridge, request, root, client)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        with pytest.raises((ssl.SSLError, ConnectionError)):
            bridge.request(request.SerializeToString(), tls=client_context(root, client, tmp_path))
    known = files.clients.issue_cert("known")
    wait_for_store(bridge, lambda: grpc_export(bridge, request, root, known))
    later = export().gauge(POWER, (3, 1)).request.SerializeToString()
    assert bridge.request(later, tls=client_context(root, known, tmp_path)).status == 200
    assert sorted(bridge.rows()) == [0, 3]


def test_certificates_are_taken_over_by_the_next_connection(run, export, files):
    bridge = start_tls(run, files)
    old = files.authority.cert_pem.bytes()
    request = export().gauge(POWER, (0, 1_000_000)).request
    wait_for_store(bridge, lambda: grpc_export(bridge, request, old))
    authority = trustme.CA()
    new = authority.cert_pem.bytes()
    files.issue(authority)
    bridge.server.take_over(default_config(), load_security(files.tls(), None))
    grpc_export(bridge, request, new)
    assert bridge.request(request.SerializeToString(), tls=client_context(new)).status == 200
    with pytest.raises(grpc.RpcError):
        grpc_export(bridge, request, old)
    with pytest.raises(ssl.SSLError):
        bridge.request(request.SerializeToString(), tls=client_context(old))


def test_an_authority_of_clients_is_taken_over(run, export, files, tmp_path):
    bridge = start_tls(run, files, mutual=True)
    root = files.authority.cert_pem.bytes()
    request = export().gauge(POWER, (0, 1_000_000)).request
    old, others = files.clients.issue_cert("old"), trustme.CA()
    new = others.issue_cert("new")
    wait_for_store(bridge, lambda: grpc_export(bridge, request, root, old))
    (tmp_path / "clients.pem").write_bytes(others.cert_pem.bytes())
    bridge.server.take_over(default_config(), load_security(files.tls(mutual=True), None))
    grpc_export(bridge, request, root, new)
    body = request.SerializeToString()
    assert bridge.request(body, tls=client_context(root, new, tmp_path)).status == 200
    with pytest.raises(grpc.RpcError):
        grpc_export(bridge, request, root, old)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        bridge.request(body, tls=client_context(root, old, tmp_path))


def test_an_expired_certificate_is_the_clients_to_refuse(run, export, files):
    files.issue(not_after=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
    bridge = start_tls(run, files)
    body = export().gauge(POWER, (0, 1)).request.SerializeToString()
    with pytest.raises(ssl.SSLError, match="expired"):
        bridge.request(body, tls=client_context(files.authority.cert_pem.bytes()))
