"""Files of certificates and tokens, and what a service refuses to start with."""

from pathlib import Path

import pytest
import trustme
from icos_fl_service import security
from icos_fl_service.security import (
    SecuredSettings,
    SecurityError,
    TlsSettings,
    Unauthenticated,
    is_loopback,
    load_security,
)
from icos_fl_service.settings import SettingsError, load
from pydantic_settings import SettingsConfigDict
from structlog.testing import capture_logs


class Files:
    """A server's certificate and key, and the authority of its clients."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.issue()
        trustme.CA().cert_pem.write_to_path(folder / "clients.pem")

    def issue(self) -> None:
        issued = trustme.CA().issue_cert("localhost")
        issued.cert_chain_pems[0].write_to_path(self.folder / "server.pem")
        issued.private_key_pem.write_to_path(self.folder / "server.key")
        (self.folder / "server.key").chmod(0o600)

    def tls(self) -> TlsSettings:
        return TlsSettings(
            certificate=self.folder / "server.pem",
            key=self.folder / "server.key",
            client_ca=self.folder / "clients.pem",
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no token in it"),
        ("# a comment alone\n", "no token in it"),
        ("short\n", "line 1: a token of 5 characters; at least 16 are needed"),
        ("\ntwo words in one token\n", "line 2: a token of 22 characters"),
        ("töken-of-some-length\n", "a token that is not ASCII"),
    ],
)
def test_a_file_of_tokens_that_cannot_be_used_is_told_without_a_token(tmp_path, content, said):
    path = tmp_path / "tokens"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(SecurityError) as caught:
        load_security(TlsSettings(), path)
    assert str(caught.value).startswith(f"{path}")
    assert said in str(caught.value)
    assert "short" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path, files: Files):
    with pytest.raises(SecurityError, match="gone: cannot be read: No such file"):
        load_security(TlsSettings(), tmp_path / "gone")
    (tmp_path / "server.key").unlink()
    with pytest.raises(SecurityError, match=r"server.key: cannot be read: No such file"):
        load_security(files.tls(), None)


@pytest.mark.parametrize("broken", ["server.pem", "server.key", "clients.pem"])
def test_a_broken_certificate_is_named(tmp_path: Path, files: Files, broken: str):
    (tmp_path / broken).write_text("-----BEGIN CERTIFICATE-----\nnone\n")
    with pytest.raises(SecurityError, match=broken):
        load_security(files.tls(), None)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path, files: Files):
    key = (tmp_path / "server.key").read_bytes()
    files.issue()
    (tmp_path / "server.key").write_bytes(key)
    with pytest.raises(SecurityError, match="are no certificate and its key"):
        load_security(files.tls(), None)


@pytest.mark.parametrize(
    "files_given", [{"certificate": "a"}, {"key": "a"}, {"client_ca": "a"}], ids=str
)
def test_a_part_of_a_tls_setting_is_refused(files_given: dict[str, str]):
    with pytest.raises(ValueError, match="need"):
        TlsSettings(**files_given)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o666])
@pytest.mark.parametrize("name", ["server.key", "tokens"])
def test_a_secret_that_others_may_read_or_write_is_refused(files: Files, name, mode):
    tokens = files.folder / "tokens"
    tokens.write_text("a-token-of-some-length\n")
    tokens.chmod(0o640)
    assert load_security(files.tls(), tokens).token_digests
    (files.folder / name).chmod(mode)
    with pytest.raises(SecurityError, match=f"{name}: others may read or write it; chmod o= "):
        load_security(files.tls(), tokens)


class Settings(SecuredSettings):
    model_config = SettingsConfigDict(
        env_prefix="A_SERVICE_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    listen_address: str = "127.0.0.1:50051"


TLS = {"TLS__CERTIFICATE": "a.pem", "TLS__KEY": "a.key"}


def loaded(monkeypatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(f"A_SERVICE_{name}", value)
    return load(Settings)


@pytest.mark.parametrize("given", [{}, TLS, {"TOKENS": "tokens"}], ids=str)
@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "edge-1:1", "192.0.2.1:1"])
def test_other_machines_need_tls_and_authentication_or_a_word(monkeypatch, address, given):
    with pytest.raises(SettingsError) as caught:
        loaded(monkeypatch, LISTEN_ADDRESS=address, **given)
    assert str(caught.value) == (
        f"A_SERVICE_*: other machines reach {address}: give TLS__CERTIFICATE, "
        "TLS__KEY, and TOKENS or TLS__CLIENT_CA, or say INSECURE=true"
    )
    assert loaded(monkeypatch, INSECURE="true").insecure


@pytest.mark.parametrize("given", [{"TOKENS": "tokens"}, {"TLS__CLIENT_CA": "ca.pem"}], ids=str)
def test_with_tls_and_authentication_other_machines_may_call(monkeypatch, given):
    assert not loaded(monkeypatch, LISTEN_ADDRESS="0.0.0.0:1", **TLS, **given).insecure


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "127.1.2.3:0"])
def test_this_machine_needs_no_word(monkeypatch, address):
    assert is_loopback(address)
    assert loaded(monkeypatch, LISTEN_ADDRESS=address).listen_address == address


def test_a_refused_call_is_in_the_log_without_its_token_and_a_flood_of_them_once_a_minute(
    tmp_path, monkeypatch
):
    (tmp_path / "tokens").write_text("the-token-of-an-exporter\n")
    (tmp_path / "tokens").chmod(0o600)
    known = load_security(TlsSettings(), tmp_path / "tokens")
    monkeypatch.setattr(security, "_refusals", security._Refusals())
    with capture_logs() as said:
        for _ in range(100):
            with pytest.raises(Unauthenticated):
                known.check("Bearer another-secret-token")
    assert [line["reason"] for line in said] == ["the bearer token is not known"]
    assert "another-secret-token" not in str(said)
