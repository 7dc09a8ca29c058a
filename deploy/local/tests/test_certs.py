"""The files of ``icos-fl certs``, in front of real TLS servers."""

import contextlib
import datetime
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl_local import certs
from icos_fl_local.errors import LocalError, UsageError

DAY = datetime.timedelta(days=1)


def make(folder: Path, deployment: str = "node", *names: str, clients=(), days=365) -> list[str]:
    return certs.make(folder, deployment, names, clients, days, -1)


def words(lines: list[str]) -> dict[str, str]:
    """What happened to each file."""
    return {line.split()[1]: line.split()[0] for line in lines}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "certs"


@contextlib.contextmanager
def server(
    folder: Path, name: str, *, mutual: bool = False
) -> Iterator[Callable[..., x509.Certificate]]:
    """A TLS server with a certificate of the folder; call it to connect as a strict client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    if mutual:
        context.load_verify_locations(folder / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                with contextlib.suppress(OSError), context.wrap_socket(connection, True) as secure:
                    secure.sendall(b"x")

    thread = threading.Thread(target=serve)
    thread.start()

    def connect(host: str, client: str | None = None, ca: Path | None = None) -> x509.Certificate:
        trust = ssl.create_default_context(cafile=ca or folder / "ca.pem")
        trust.verify_flags |= ssl.VERIFY_X509_STRICT
        if client:
            trust.load_cert_chain(folder / f"{client}.pem", folder / f"{client}.key")
        with (
            socket.create_connection(listener.getsockname(), 5) as plain,
            trust.wrap_socket(plain, server_hostname=host) as secure,
        ):
            assert secure.recv(1) == b"x"  # a refused client hears of it here
            shown = secure.getpeercert(binary_form=True)
        assert shown is not None
        return x509.load_der_x509_certificate(shown)

    try:
        yield connect
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.mark.parametrize(
    "host", ["fl.example.org", "10.1.2.3", "2001:db8::7", "gateway", "localhost", "127.0.0.1"]
)
def test_a_server_is_who_it_says_by_each_of_its_names(folder: Path, host: str) -> None:
    make(folder, "controller", "FL.example.org", "10.1.2.3", "2001:DB8::7")
    with server(folder, "gateway") as connect:
        assert connect(host) == certs.load(folder / "gateway.pem").x509


def test_another_name_and_another_authority_are_refused(folder: Path, tmp_path: Path) -> None:
    make(folder, "controller", "fl.example.org")
    make(tmp_path / "other", "controller", "fl.example.org")
    with server(folder, "gateway") as connect:
        with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for 'example\.org'"):
            connect("example.org")
        with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
            connect("fl.example.org", ca=tmp_path / "other" / "ca.pem")


def test_only_a_clients_certificate_makes_a_client(folder: Path) -> None:
    make(folder, clients=["edge-2"])
    with server(folder, "processor", mutual=True) as connect:
        for client in ("fl-client", "collector", "edge-2"):
            connect("processor", client)
        for no_client in (None, "otlp-bridge"):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                connect("processor", no_client)


def test_a_clients_certificate_makes_no_server(folder: Path) -> None:
    make(folder)
    with (
        server(folder, "collector") as connect,
        pytest.raises(ssl.SSLCertVerificationError, match="certificate purpose"),
    ):
        connect("collector")


def test_keys_are_their_owners_alone_and_certificates_everybodys(folder: Path) -> None:
    old = os.umask(0)
    try:
        make(folder)
    finally:
        os.umask(old)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir()}
    assert modes == {name: "0o600" if name.endswith(".key") else "0o644" for name in modes}
    assert {"ca.key", "processor.key", "fl-client.key"} < modes.keys()


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_services_files_are_given_to_it_and_the_authoritys_key_is_not(folder: Path) -> None:
    certs.make(folder, "node", [], [], 365, 10001)
    owners = {path.name: path.stat().st_uid for path in folder.iterdir()}
    assert owners == {name: 0 if name.startswith("ca.") else 10001 for name in owners}


def test_made_again_everything_is_kept(folder: Path) -> None:
    make(folder, "node", "edge-1")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert set(words(make(folder)).values()) == {"kept"}
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_new_names_are_taken_and_the_keys_stay(folder: Path) -> None:
    make(folder, "controller", "old.example.org")
    key = (folder / "gateway.key").read_bytes()
    assert words(make(folder, "controller", "new.example.org"))["gateway.pem"] == "renewed"
    assert certs.load(folder / "gateway.pem").names[0] == "new.example.org"
    assert (folder / "gateway.key").read_bytes() == key


def test_what_is_in_its_last_third_is_renewed_for_the_same_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder, "node", "edge-1", days=90)
    make(folder, clients=["long"], days=365)
    names = certs.load(folder / "processor.pem").names
    monkeypatch.setattr(certs, "_now", lambda: datetime.datetime.now(datetime.UTC) + 61 * DAY)
    assert certs.show(folder, as_json=False) == 1
    told = words(certs.renew(folder, 90, -1, also_good=False))
    assert (told["processor.pem"], told["long.pem"]) == ("renewed", "kept")
    assert certs.load(folder / "processor.pem").names == names
    assert certs.show(folder, as_json=False) == 0


def test_renew_all_renews_what_is_good(folder: Path) -> None:
    make(folder)
    told = words(certs.renew(folder, 365, -1, also_good=True))
    assert set(told.values()) == {"renewed"}
    assert "ca.pem" not in told


def test_a_certificate_does_not_outlive_its_authority(folder: Path) -> None:
    make(folder, days=20_000)
    authority, processor = (certs.load(folder / f"{name}.pem") for name in ("ca", "processor"))
    assert processor.until == authority.until


@pytest.mark.parametrize(
    ("spoil", "state"),
    [
        (lambda folder: (folder / "processor.key").rename(folder / "collector.key"), "another key"),
        (lambda folder: make(folder.parent / "other"), "another authority"),
    ],
    ids=["key", "authority"],
)
def test_show_says_what_is_of_no_use(folder: Path, capsys, spoil, state: str) -> None:
    make(folder)
    spoil(folder)
    if state == "another authority":
        (folder.parent / "other" / "collector.pem").replace(folder / "collector.pem")
    assert certs.show(folder, as_json=False) == 1
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith(f"of {state}")]


def test_who_reads_while_it_is_renewed_always_finds_a_pair(folder: Path) -> None:
    make(folder)
    over = threading.Event()
    loads = 0

    def renew() -> None:
        for _ in range(20):
            certs.renew(folder, 365, -1, also_good=True)
        over.set()

    thread = threading.Thread(target=renew)
    thread.start()
    while not over.is_set():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "processor.pem", folder / "processor.key")
        loads += 1
    thread.join()
    assert loads > 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["controller"], "give --name NAME"),
        (["node", "--name", "a_b"], "--name a_b: neither a DNS name nor an IP address"),
        (["node", "--name", "edge:4317"], "--name edge:4317: neither"),
        (["node", "--client", "../up"], "--client ../up: a name of letters"),
        (["node", "--client", "ca"], "--client ca: another name than ca, gateway"),
        (["node", "--client", "processor"], "--client processor: another name than ca"),
        (["renew"], "certs/ca.pem: is not there; make it with 'icos-fl certs controller'"),
        (["show"], "certs/ca.pem: is not there; make it with"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "icos_fl_local", "certs", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode > 0, done.stdout) == (True, "")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--days", "0"], "argument --days: 0: a whole number from 1 to 3650"),
        (["--days", "9999"], "argument --days: 9999: a whole number from 1 to 3650"),
        (["--days", "x"], "argument --days: x: a whole number from 1 to 3650"),
        (["--uid", "99999999999"], "argument --uid: 99999999999: a whole number from 0"),
        (["--uid=-1"], "argument --uid: -1: a whole number from 0 to 4294967294"),
    ],
)
def test_a_number_out_of_range_makes_nothing(tmp_path: Path, arguments: list[str], said: str):
    command = [sys.executable, "-m", "icos_fl_local", "certs", "node", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert said in done.stderr


def test_giving_files_away_needs_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int, uid: int, __: int) -> None:
        if uid != -1:
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(
        LocalError, match=r"cannot be given to uid 10001 by uid \d+; run it as root"
    ):
        certs.make(tmp_path, "node", [], [], 1, 10001)
    assert not [*tmp_path.glob(".*")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("ca.key", None, "certificates are made where the authority's key is"),
        ("ca.key", "nonsense", "no elliptic curve key in PEM"),
        ("ca.pem", "nonsense", "no certificate in PEM; delete it"),
        ("processor.pem", "nonsense", "no certificate in PEM; delete it"),
        ("processor.key", "nonsense", "or delete it and processor.pem to have both made anew"),
    ],
)
def test_a_broken_file_is_named_with_its_cure(folder: Path, name, content, said: str) -> None:
    make(folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(LocalError, match=rf"{name}: ") as caught:
        make(folder)
    assert said in str(caught.value)


def test_an_authority_that_has_expired_is_no_more_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder)
    monkeypatch.setattr(certs, "_now", lambda: datetime.datetime.now(datetime.UTC) + 3651 * DAY)
    with pytest.raises(LocalError, match=r"ca.pem: expired; make another authority"):
        make(folder)


def test_a_controller_needs_its_outer_name_once(folder: Path) -> None:
    with pytest.raises(UsageError):
        make(folder, "controller")
    make(folder, "controller", "fl.example.org")
    make(folder, "controller")


@pytest.fixture
def bridge(folder: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """The bridge's command with the files that were made for it, its port and its log."""
    make(folder)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    log = tmp_path / "bridge.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "icos_fl_otlp_bridge"],
            env=os.environ
            | {
                "ICOS_FL_BRIDGE_LISTEN_ADDRESS": f"127.0.0.1:{port}",
                "ICOS_FL_BRIDGE_TLS__CERTIFICATE": str(folder / "otlp-bridge.pem"),
                "ICOS_FL_BRIDGE_TLS__KEY": str(folder / "otlp-bridge.key"),
                "ICOS_FL_BRIDGE_TLS__CLIENT_CA": str(folder / "ca.pem"),
            },
            stdout=stream,
            stderr=stream,
        )
    try:
        wait_until(lambda: "bridge serves" in log.read_text())
        yield process, port, log
    finally:
        process.terminate()
        process.wait(30)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_bridge_takes_a_renewed_certificate_over_without_a_stop(folder: Path, bridge) -> None:
    process, port, log = bridge

    def healthy(client: str | None) -> bool:
        """Does the bridge answer at all? Its store is not there."""
        pair = ("key", "pem") if client else ()
        credentials = grpc.ssl_channel_credentials(
            (folder / "ca.pem").read_bytes(),
            *((folder / f"{client}.{suffix}").read_bytes() for suffix in pair),
        )
        with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        return True

    def shown() -> x509.Certificate:
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        context.load_cert_chain(folder / "collector.pem", folder / "collector.key")
        with (
            socket.create_connection(("127.0.0.1", port), 5) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")

    assert healthy("collector")
    for refused in (None, "processor"):  # nobody, and a server
        with pytest.raises(grpc.RpcError):
            healthy(refused)
    old = shown()
    certs.renew(folder, 365, -1, also_good=True)
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: "taken over" in log.read_text())
    assert old != shown() == certs.load(folder / "otlp-bridge.pem").x509
    assert healthy("collector")
    assert process.poll() is None
