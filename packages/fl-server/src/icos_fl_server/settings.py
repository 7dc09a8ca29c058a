"""What of Flower's run configuration concerns the server."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from icos_fl_timeseries_store import StoreSettings
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from icos_fl_server.errors import ServerError
from icos_fl_server.strategies import AVERAGES, STRATEGIES

_COLUMN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def _names(value: object) -> object:
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return value


def _columns(names: tuple[str, ...]) -> tuple[str, ...]:
    """A metric names a folder of checkpoints and records in messages."""
    if not names:
        raise ValueError("names no column")
    for name in names:
        if not _COLUMN.fullmatch(name):
            raise ValueError(f"{name!r} is no column: letters, digits, '_', '.' and '-'")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return names


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if value and not (host and port.isdecimal() and 1 <= int(port) <= 65535):
        raise ValueError("is not of the form host:port")
    return value


def _strategy(value: object) -> object:
    if value not in STRATEGIES:
        raise ValueError(f"no such strategy; there are {', '.join(STRATEGIES)}")
    return value


def _hyphenated(name: str) -> str:
    return name.replace("_", "-")


class RunConfig(BaseModel):
    """The server's keys; the others of the run configuration are the nodes'."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", alias_generator=_hyphenated, allow_inf_nan=False
    )

    metric: Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_columns)]
    num_server_rounds: int = Field(default=5, ge=1, le=1_000_000)
    strategy: Annotated[str, BeforeValidator(_strategy)] = "FedAvg"
    proximal_mu: float = Field(default=0.1, ge=0)
    dp_clipping_norm: float = Field(default=0.0, ge=0)
    dp_noise_multiplier: float = Field(default=0.0, ge=0, validate_default=True)
    dp_delta: float = Field(default=1e-5, gt=0, lt=1)
    fraction_fit: float = Field(default=1.0, gt=0, le=1)
    fraction_evaluate: float = Field(default=1.0, ge=0, le=1)
    min_fit_clients: int = Field(default=1, ge=1)
    min_evaluate_clients: int = Field(default=1, ge=0)
    min_available_clients: int = Field(default=2, ge=1)
    node_timeout: float = Field(default=120.0, gt=0, le=86_400)
    round_timeout: float = Field(default=600.0, gt=0, le=86_400)
    server_node: str = ""
    resume: str = ""
    result_dir: Path = Path("icos-fl-results")
    store_address: Annotated[str, AfterValidator(_address)] = ""
    metrics_address: Annotated[str, AfterValidator(_address)] = ""
    use_wandb: bool = False
    seed: int = 0

    @field_validator("dp_noise_multiplier")
    @classmethod
    def _differential_privacy(cls, value: float, info: ValidationInfo) -> float:
        if bool(value) != bool(info.data.get("dp_clipping_norm", value)):
            raise ValueError("needs dp-clipping-norm, and that needs it: both above 0, or both 0")
        strategy = info.data.get("strategy")
        if value and strategy and strategy not in AVERAGES:
            raise ValueError(
                f"the ε that is spent is known of averages, {' and '.join(AVERAGES)}; "
                f"strategy is {strategy!r}"
            )
        return value

    @property
    def is_private(self) -> bool:
        """Is there differential privacy?"""
        return self.dp_noise_multiplier > 0

    @property
    def store(self) -> StoreSettings | None:
        """Where the server's model state goes; None for nowhere."""
        if not self.store_address:
            return None
        host, _, port = self.store_address.rpartition(":")
        return StoreSettings(host=host, port=int(port))


def parse(run_config: Mapping[str, Any]) -> RunConfig:
    """Raises ServerError with every bad key, its value and its limit."""
    try:
        return RunConfig.model_validate(dict(run_config))
    except ValidationError as error:
        problems = [
            f"{_hyphenated('.'.join(map(str, item['loc'])))}={item['input']!r}: "
            f"{item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        raise ServerError(f"bad run config: {'; '.join(problems)}") from None
