"""Settings of the bridge, from the environment."""

from pathlib import Path
from typing import Literal

from icos_fl_service.security import SecuredSettings
from icos_fl_timeseries_store import StoreSettings
from pydantic import Field
from pydantic_settings import SettingsConfigDict


class BridgeSettings(SecuredSettings):
    """``ICOS_FL_BRIDGE_*``, read once in ``__main__``."""

    model_config = SettingsConfigDict(
        env_prefix="ICOS_FL_BRIDGE_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    listen_address: str = Field(default="127.0.0.1:4317", pattern=r"^\S+:\d{1,5}$")
    """host:port to serve OTLP/gRPC on; port 0 takes a free one."""
    http_listen_address: str = Field(default="", pattern=r"^(\S+:\d{1,5})?$")
    """host:port to serve OTLP/HTTP on, usually with port 4318; empty: not at all."""
    config: Path | None = None
    """The configuration file; the packaged one without it."""
    store: StoreSettings = StoreSettings()
    """Where the windows are."""
    max_message_bytes: int = Field(default=64 << 20, ge=64 << 10, le=1 << 31)
    """The largest request, after decompression."""
    max_concurrent_exports: int = Field(default=16, ge=1, le=1024)
    """Requests that are worked on at once; each may take max_message_bytes of memory."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    def addresses(self) -> tuple[str, ...]:
        """Of both transports, for which TLS and tokens are the same."""
        return (self.listen_address, self.http_listen_address)
