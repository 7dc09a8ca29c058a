"""Who may export: certificates and bearer tokens, read from files."""

import hashlib
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from icos_fl_otlp_bridge.errors import ConfigError, Unauthenticated
from icos_fl_otlp_bridge.settings import TlsSettings

TOKEN_CHARACTERS_MIN: Final = 16
_SCHEME: Final = "bearer "


@dataclass(frozen=True)
class Tls:
    """A server's certificate, and whose clients' certificates it asks for."""

    certificate: bytes
    """PEM, with the chain."""
    key: bytes
    client_ca: bytes | None
    """PEM. With it every client must show a certificate of this authority."""
    context: ssl.SSLContext
    """The same, for Python's own sockets."""


@dataclass(frozen=True)
class Security:
    """What a transport asks of who connects; nothing by default."""

    tls: Tls | None = None
    token_digests: frozenset[bytes] | None = None

    def check(self, authorization: str | None) -> None:
        """Raises Unauthenticated unless the header holds a known token, or none is needed."""
        if self.token_digests is None:
            return
        if authorization is None:
            raise Unauthenticated("an authorization header with a bearer token is needed")
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthenticated("the authorization header has no bearer token")
        # Looking up a digest takes as long for a good guess as for a bad one.
        if _digest(authorization[len(_SCHEME) :].strip()) not in self.token_digests:
            raise Unauthenticated("the bearer token is not known")


def load_security(tls: TlsSettings, tokens: Path | None) -> Security:
    """Read the files. Raises ConfigError, which names the file and never tells a secret."""
    return Security(_tls(tls), None if tokens is None else _tokens(tokens))


def _tokens(path: Path) -> frozenset[bytes]:
    """One token a line; empty lines and those that begin with # are none."""
    try:
        lines = _read(path).decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: a token that is not ASCII") from None
    digests = set()
    for number, line in enumerate(lines, 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if len(token) < TOKEN_CHARACTERS_MIN or not token.isprintable() or " " in token:
            raise ConfigError(
                f"{path}, line {number}: a token of {len(token)} characters; at least "
                f"{TOKEN_CHARACTERS_MIN} are needed, and no space among them"
            )
        digests.add(_digest(token))
    if not digests:
        raise ConfigError(f"{path}: no token in it, so nobody could export")
    return frozenset(digests)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()


def _tls(settings: TlsSettings) -> Tls | None:
    paths = (settings.certificate, settings.key, settings.client_ca)
    certificate, key, client_ca = paths
    if certificate is None or key is None:
        return None
    found = _read(certificate), _read(key), None if client_ca is None else _read(client_ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(
            f"{certificate} and {key} are no certificate and its key: {error}"
        ) from None
    if found[2] is not None:
        try:
            context.load_verify_locations(cadata=found[2].decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"{client_ca} is no certificate authority: {error}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    if (certificate.read_bytes(), key.read_bytes()) != found[:2]:
        raise ConfigError(f"{certificate} or {key} changed while being read")
    return Tls(*found, context)


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
