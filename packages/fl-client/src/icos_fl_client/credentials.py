"""Files of certificates and a token, by which a processor or a forecaster is called."""

import contextlib
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from icos_fl_service.security import SecurityError, read_file, read_secret
from icos_fl_service.settings import split_address

from icos_fl_client.errors import ConfigError

_ASK_SECONDS = 3.0


@dataclass(frozen=True)
class Credentials:
    """Files, read whenever a connection is made. Raises ConfigError; nothing is no TLS."""

    ca: Path | None = None
    """PEM of who signed the server's certificate; with it there is TLS."""
    certificate: Path | None = None
    """PEM that the server is shown."""
    key: Path | None = None
    token: Path | None = None
    """A bearer token."""
    whose: str = "processor"
    """Before the names of settings, in errors."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError(f"{self.whose}-certificate and {self.whose}-key need each other")
        if self.certificate is not None and self.ca is None:
            raise ConfigError(f"{self.whose}-certificate needs {self.whose}-ca")

    def channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """To the server at host:port."""
        if self.ca is None:
            return grpc.insecure_channel(address, options)
        with _named():
            credentials = grpc.ssl_channel_credentials(
                read_file(self.ca),
                read_secret(self.key) if self.key else None,
                read_file(self.certificate) if self.certificate else None,
            )
        return grpc.secure_channel(address, credentials, options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with each call."""
        if self.token is None:
            return ()
        with _named():
            token = read_secret(self.token).decode("latin-1").strip()
        if not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(f"{self.token}: more than one token, or one that is not ASCII")
        return (("authorization", f"Bearer {token}"),)

    def refusal(self, address: str) -> str:
        """Why no connection to host:port comes about, if that is for TLS; else empty.

        gRPC tells who waits for a connection nothing of it, and of some reasons nobody.
        """
        host, port = split_address(address)
        try:
            context = self._context()
            with (
                socket.create_connection((host, port), _ASK_SECONDS) as raw,
                context.wrap_socket(raw, server_hostname=host) as connection,
            ):
                if self.ca is None:
                    return f"it asks for TLS, and there is no {self.whose}-ca"
                if connection.recv(1):  # a server speaks first, of its settings
                    return ""
        except ssl.SSLCertVerificationError as error:
            return f"its certificate is not what {self.ca} says: {error.verify_message}"
        except ssl.SSLError as error:
            return "" if self.ca is None else f"TLS with it fails: {error.reason or error}"
        except OSError:
            return ""
        if self.certificate is None:
            return f"it asks for a client's certificate, and there is no {self.whose}-certificate"
        return f"it refuses the certificate {self.certificate}"

    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca)
        context.set_alpn_protocols(["h2"])
        if self.ca is None:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if self.certificate is not None:
            # Else it would ask the terminal for the password of an encrypted key.
            context.load_cert_chain(self.certificate, self.key, password="")
        return context


@contextlib.contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except SecurityError as error:
        raise ConfigError(str(error)) from None
