"""Settings of the bridge, from the environment."""

from pathlib import Path
from typing import Literal, Self

from icos_fl_service.settings import ServiceSettings
from icos_fl_timeseries_store import StoreSettings
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import SettingsConfigDict


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


class BridgeSettings(ServiceSettings):
    """``ICOS_FL_BRIDGE_*``, read once in ``__main__``."""

    model_config = SettingsConfigDict(
        env_prefix="ICOS_FL_BRIDGE_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    listen_address: str = Field(default="127.0.0.1:4317", pattern=r"^\S+:\d{1,5}$")
    """host:port to serve OTLP/gRPC on; port 0 takes a free one."""
    http_listen_address: str = Field(default="", pattern=r"^(\S+:\d{1,5})?$")
    """host:port to serve OTLP/HTTP on, usually with port 4318; empty: not at all."""
    tls: TlsSettings = TlsSettings()
    """For both transports."""
    tokens: Path | None = None
    """A file of bearer tokens, one a line, of which an exporter needs one; it is read again at
    SIGHUP."""
    config: Path | None = None
    """The configuration file; the packaged one without it."""
    store: StoreSettings = StoreSettings()
    """Where the windows are."""
    max_message_bytes: int = Field(default=64 << 20, ge=64 << 10, le=1 << 31)
    """The largest request, after decompression."""
    max_concurrent_exports: int = Field(default=16, ge=1, le=1024)
    """Requests that are worked on at once; each may take max_message_bytes of memory."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
