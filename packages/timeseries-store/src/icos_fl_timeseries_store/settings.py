"""Where the store is; part of the settings of every service that uses it."""

from pydantic import BaseModel, ConfigDict, Field


class StoreSettings(BaseModel):
    """Where the store is. Part of the settings of every service that uses it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    """Host of dataClay's metadata service."""
    port: int = Field(default=16587, ge=1, le=65535)
    """Port of dataClay's metadata service."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """The longest that a call may take before it raises StoreUnavailable."""
