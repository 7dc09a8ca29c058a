"""Settings of the forecaster, from the environment."""

import re
from pathlib import Path
from typing import Annotated, Self

from icos_fl_service.security import SecuredSettings
from icos_fl_service.web import check_readers
from icos_fl_timeseries_store import StoreSettings
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from icos_fl_client.credentials import Credentials
from icos_fl_client.settings import AddressOrNone, Names

STEPS_AHEAD_MAX = 4096
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def duration_seconds(text: str) -> float:
    """Of "90s", "1.5m", "1h" or "1d". Raises ValueError."""
    found = re.fullmatch(r"([0-9]{1,7}(?:\.[0-9]{1,9})?)([smhd])", text.strip())
    if not found:
        raise ValueError(f"{text!r} is no duration such as 90s, 5m, 1h or 1d")
    return float(found[1]) * _SECONDS[found[2]]


def duration_text(seconds: float) -> str:
    """The shortest form that says it exactly."""
    for unit, length in reversed(_SECONDS.items()):
        if seconds >= length and seconds % length == 0:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds:g}s"


def _durations(value: object) -> object:
    if isinstance(value, str):
        return tuple(sorted({duration_seconds(part) for part in value.split(",") if part.strip()}))
    return value


class ProcessorSettings(BaseModel):
    """Where the processor is, and how it is called: for models that are modules of torch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: AddressOrNone = ""
    """host:port; empty: only the default model takes part."""
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: Path | None = None

    def credentials(self) -> Credentials:
        """Raises ConfigError."""
        return Credentials(self.ca, self.certificate, self.key, self.token)


class ForecasterSettings(SecuredSettings):
    """``ICOS_FL_FORECASTER_*``, read once in ``__main__``."""

    model_config = SettingsConfigDict(
        env_prefix="ICOS_FL_FORECASTER_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    listen_address: str = Field(default="127.0.0.1:50052", pattern=r"^\S+:\d{1,5}$")
    """host:port to serve gRPC on; port 0 takes a free one. Whoever may call reads all metrics."""
    store: StoreSettings = StoreSettings()
    """Where the windows and the models are."""
    processor: ProcessorSettings = ProcessorSettings()
    interval_seconds: float = Field(default=15.0, ge=0.1, le=86_400)
    """Length of a step: what is forecast are means over so long. A federated model takes part if
    its steps are as long."""
    horizons: Annotated[tuple[float, ...], NoDecode, BeforeValidator(_durations)] = (
        60.0,
        300.0,
        3600.0,
    )
    """How far ahead is forecast: durations such as 1m,5m,1h, each of whole steps."""
    metrics: Annotated[Names, NoDecode] = ()
    """Columns to forecast, separated by commas; all without it."""
    state_folder: Path | None = None
    """Where what was learned outlives a restart; without it a restart begins anew."""
    expectations: Path | None = None
    """File that says what healthy windows look like, and what values can be; the processor's."""
    recorded: bool = False
    """Are the rows recorded ones, whose times are not compared with the clock?"""
    page_address: str = Field(default="", pattern=r"^(\S+:\d{1,5})?$")
    """host:port to serve the page for people on; port 0 takes a free one. Empty: off. An address
    that other machines reach needs TOKENS."""
    watchers_max: int = Field(default=16, ge=1, le=1000)
    """Clients that may watch forecasts at once; each takes a thread."""

    def addresses(self) -> tuple[str, ...]:
        """See SecuredSettings."""
        return (self.listen_address, self.page_address)

    @model_validator(mode="after")
    def _page_for_whom(self) -> Self:
        check_readers(self.page_address, self.tokens)
        return self

    @model_validator(mode="after")
    def _whole_steps(self) -> Self:
        if not self.horizons:
            raise ValueError("HORIZONS is empty; at least one is needed")
        for seconds in self.horizons:
            steps = round(seconds / self.interval_seconds, 6)
            if steps != round(steps) or not 1 <= steps <= STEPS_AHEAD_MAX:
                raise ValueError(
                    f"HORIZONS has {duration_text(seconds)}, {steps:g} steps of "
                    f"{self.interval_seconds:g} s (INTERVAL_SECONDS); "
                    f"1 to {STEPS_AHEAD_MAX} whole ones are needed"
                )
        return self
