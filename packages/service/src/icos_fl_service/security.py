"""Who may call a service: certificates and bearer tokens, read from files."""

import hashlib
import ipaddress
import math
import signal
import ssl
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import grpc
import structlog
from pydantic import BaseModel, ConfigDict, Field, model_validator

from icos_fl_service import calls
from icos_fl_service.settings import ServiceSettings, split_address
from icos_fl_service.signals import Signals

TOKEN_CHARACTERS_MIN: Final = 16
_SCHEME: Final = "bearer "
_TELLING_SECONDS: Final = 60.0

log = structlog.get_logger()


class SecurityError(Exception):
    """Files that cannot be used; the message names them and never tells a secret."""


class Unauthenticated(Exception):
    """A bearer token is missing or not known."""


class TlsSettings(BaseModel):
    """Files of PEM; they are read again at SIGHUP. Neither certificate nor key: no TLS."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    certificate: Path | None = None
    """The server's certificate, with its chain."""
    key: Path | None = None
    """Its private key, not encrypted."""
    client_ca: Path | None = None
    """With it, every client must show a certificate that this authority has signed."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("CERTIFICATE and KEY need each other")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("CLIENT_CA needs CERTIFICATE and KEY")
        return self


class SecuredSettings(ServiceSettings):
    """Settings of a service that asks who calls; its own class derives from it."""

    listen_address: str = Field(pattern=r"^\S+:\d{1,5}$")
    """host:port to serve gRPC on; port 0 takes a free one."""
    tls: TlsSettings = TlsSettings()
    tokens: Path | None = None
    """A file of bearer tokens, one a line, of which a caller needs one; it is read again at
    SIGHUP."""
    insecure: bool = False
    """May other machines call without TLS, or without showing who they are?"""

    def addresses(self) -> tuple[str, ...]:
        """All that the service listens on for calls; empty ones are none."""
        return (self.listen_address,)

    @model_validator(mode="after")
    def _closed(self) -> Self:
        authenticated = self.tokens is not None or self.tls.client_ca is not None
        if self.insecure or (self.tls.certificate is not None and authenticated):
            return self
        for address in filter(None, self.addresses()):
            if not is_loopback(address):
                raise ValueError(
                    f"other machines reach {address}: give TLS__CERTIFICATE, TLS__KEY, and TOKENS "
                    "or TLS__CLIENT_CA, or say INSECURE=true"
                )
        return self


def is_loopback(address: str) -> bool:
    """Is host:port one that only this machine reaches?"""
    host = split_address(address)[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Refusals:
    """Told in the log once a minute at most: a stranger asks as often as he likes."""

    def __init__(self) -> None:
        self._told = -math.inf
        self._untold = 0

    def tell(self, reason: str) -> None:
        now = time.monotonic()
        if now < self._told + _TELLING_SECONDS:
            self._untold += 1
            return
        log.warning("call refused", reason=reason, more_since_the_last_line=self._untold)
        self._told, self._untold = now, 0


_refusals: Final = _Refusals()


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
        try:
            self._check(authorization)
        except Unauthenticated as error:
            _refusals.tell(str(error))
            raise

    def _check(self, authorization: str | None) -> None:
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
    """Read the files. Raises SecurityError."""
    return Security(_tls(tls), None if tokens is None else _tokens(tokens))


def renew_until_stopped(
    signals: Signals, settings: SecuredSettings, take_over: Callable[[Security], None]
) -> None:
    """At each SIGHUP *take_over* gets what the files have now; any other signal is the end."""
    while signals.wait() == signal.SIGHUP:
        try:
            take_over(load_security(settings.tls, settings.tokens))
        except SecurityError as error:
            log.error("new certificates and tokens refused, the old ones go on", reason=str(error))
        else:
            log.info("new certificates and tokens taken over")


def read_secret(path: Path) -> bytes:
    """What *path* holds. Raises SecurityError, also where others may read or write it."""
    try:
        if path.stat().st_mode & stat.S_IRWXO:
            raise SecurityError(f"{path}: others may read or write it; chmod o= {path}")
    except OSError as error:
        raise SecurityError(f"{path}: cannot be read: {error.strerror}") from None
    return read_file(path)


def read_file(path: Path) -> bytes:
    """What *path* holds. Raises SecurityError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SecurityError(f"{path}: cannot be read: {error.strerror}") from None


def grpc_credentials(newest: Callable[[], Security]) -> grpc.ServerCredentials | None:
    """For a gRPC server, whose handshakes go by the *newest*; None where it has no TLS.

    Whether there is TLS, and whether clients need a certificate, cannot change.
    """
    first = newest().tls
    if first is None:
        return None

    def configuration() -> grpc.ServerCertificateConfiguration:
        tls = newest().tls or first
        return grpc.ssl_server_certificate_configuration(
            [(tls.key, tls.certificate)], tls.client_ca
        )

    return grpc.dynamic_ssl_server_credentials(
        configuration(), configuration, require_client_authentication=first.client_ca is not None
    )


class TokenCheck(grpc.ServerInterceptor):
    """Refuses calls of *service* that the *newest* Security does not let in, before their message
    is read. Health and reflection are not asked for a token."""

    def __init__(self, service: str, newest: Callable[[], Security]) -> None:
        self._prefix = f"/{service}/"
        self._newest = newest

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """See grpc.ServerInterceptor."""
        handler = continuation(details)
        if handler is None or not details.method.startswith(self._prefix):
            return handler
        metadata = dict(details.invocation_metadata or ())
        authorization = metadata.get("authorization")
        try:
            self._newest().check(None if authorization is None else str(authorization))
        except Unauthenticated as error:
            calls.count(details.method.removeprefix(self._prefix), "UNAUTHENTICATED")
            return _refusing(str(error))
        return handler


def _refusing(reason: str) -> "grpc.RpcMethodHandler[Any, Any]":
    def refuse(_: Any, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)

    # As one of a stream it is called before the message is there.
    return grpc.stream_unary_rpc_method_handler(refuse)


def _tokens(path: Path) -> frozenset[bytes]:
    """One token a line; empty lines and those that begin with # are none."""
    try:
        lines = read_secret(path).decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise SecurityError(f"{path}: a token that is not ASCII") from None
    digests = set()
    for number, line in enumerate(lines, 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if len(token) < TOKEN_CHARACTERS_MIN or not token.isprintable() or " " in token:
            raise SecurityError(
                f"{path}, line {number}: a token of {len(token)} characters; at least "
                f"{TOKEN_CHARACTERS_MIN} are needed, and no space among them"
            )
        digests.add(_digest(token))
    if not digests:
        raise SecurityError(f"{path}: no token in it, so nobody could call")
    return frozenset(digests)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()


def _tls(settings: TlsSettings) -> Tls | None:
    certificate, key, client_ca = settings.certificate, settings.key, settings.client_ca
    if certificate is None or key is None:
        return None
    found = (
        read_file(certificate),
        read_secret(key),
        None if client_ca is None else read_file(client_ca),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise SecurityError(
            f"{certificate} and {key} are no certificate and its key: {error}"
        ) from None
    if found[2] is not None:
        try:
            context.load_verify_locations(cadata=found[2].decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise SecurityError(f"{client_ca} is no certificate authority: {error}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    if (certificate.read_bytes(), key.read_bytes()) != found[:2]:
        raise SecurityError(f"{certificate} or {key} changed while being read")
    return Tls(*found, context)


def _no_password() -> str:
    raise ValueError("the key is encrypted")
