"""Settings of the processor, from the environment."""

from pathlib import Path

from icos_fl_service.security import SecuredSettings
from icos_fl_timeseries_store import StoreSettings
from pydantic import Field
from pydantic_settings import SettingsConfigDict


class ProcessorSettings(SecuredSettings):
    """``ICOS_FL_PROCESSOR_*``, read once in ``__main__``."""

    model_config = SettingsConfigDict(
        env_prefix="ICOS_FL_PROCESSOR_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    listen_address: str = Field(default="127.0.0.1:50051", pattern=r"^\S+:\d{1,5}$")
    """host:port to serve gRPC on; port 0 takes a free one. Whoever may call reads all windows."""
    store: StoreSettings = StoreSettings()
    """Where the windows are."""
    max_message_bytes: int = Field(default=4 << 20, ge=64 << 10, le=1 << 30)
    """The largest message, either way. Clients receive 4 MiB by default."""
    watchers_max: int = Field(default=64, ge=1, le=1000)
    """Clients that may watch windows at once; each takes a thread."""
    expectations: Path | None = None
    """File that says what healthy windows look like; the defaults without it."""
    recorded: bool = False
    """Are the rows recorded ones, whose times are not compared with the clock?"""
