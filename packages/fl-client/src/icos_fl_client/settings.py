"""Settings of a node (from the SuperNode) and of a run (from Flower's run configuration)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from icos_fl_timeseries_store import StoreSettings
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from icos_fl_client.credentials import Credentials
from icos_fl_client.errors import ConfigError
from icos_fl_client.processor_client import Query

M = TypeVar("M", bound=BaseModel)


def _names(value: object) -> object:
    if isinstance(value, str):
        return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
"""Column names, in the configuration separated by commas."""


def address(value: str) -> str:
    """*value* if it is host:port; raises ValueError."""
    host, _, port = value.rpartition(":")
    if not (host and port.isdecimal() and 1 <= int(port) <= 65_535):
        raise ValueError("must be host:port, with a port from 1 to 65535")
    return value


Address = Annotated[str, AfterValidator(address)]
AddressOrNone = Annotated[str, AfterValidator(lambda value: address(value) if value else value)]
"""host:port, or empty for nowhere."""


FileOrNone = Annotated[Path | None, BeforeValidator(lambda value: value or None)]
"""A file, or empty for none."""


def _hyphenated(name: str) -> str:
    return name.replace("_", "-")


class NodeConfig(BaseModel):
    """Who and where this node is: ``flower-supernode --node-config``."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=_hyphenated)

    node_name: str = Field(min_length=1)
    """The node, as the bridge names it."""
    processor_address: Address
    """Where the processor is."""
    processor_ca: FileOrNone = None
    processor_certificate: FileOrNone = None
    processor_key: FileOrNone = None
    processor_token: FileOrNone = None
    store_address: AddressOrNone
    """Where dataClay's metadata service is; empty, and the node keeps no model to forecast from."""
    threads: int = Field(default=0, ge=0)
    """Threads of torch; 0 lets torch choose. Nodes that share a machine should share its cores."""

    @property
    def processor_credentials(self) -> Credentials:
        """How the processor is called. Raises ConfigError."""
        return Credentials(
            self.processor_ca, self.processor_certificate, self.processor_key, self.processor_token
        )

    @property
    def store(self) -> StoreSettings | None:
        """Where the node's model state goes; None for nowhere."""
        return store_settings(self.store_address) if self.store_address else None


class RunConfig(BaseModel):
    """What of the run configuration concerns a node; its other keys are the server's."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=_hyphenated)

    metric: Names = Field(min_length=1)
    features: Names = ()
    interval: float = Field(default=15.0, ge=0, le=86_400)
    time_step: int = Field(default=40, ge=1, le=100_000)
    horizon: int = Field(default=20, ge=1, le=100_000)
    train_test_split: float = Field(default=0.8, gt=0, le=1)
    model: str = "icos_fl_client.models:AnchorLSTM"
    hidden_layer_size: int = Field(default=16, ge=1, le=65_536)
    num_layers: int = Field(default=1, ge=1, le=64)
    batch_size: int = Field(default=64, ge=1, le=1_000_000)
    local_epochs: int = Field(default=3, ge=1, le=100_000)
    learning_rate: float = Field(default=0.002, gt=0, le=10)
    seed: int = Field(default=0, ge=0, lt=2**63)
    server_node: str = ""
    server_device: str = "auto"

    def features_of(self, metric: str) -> tuple[str, ...]:
        """The input columns beside *metric*, which is the first one itself."""
        return tuple(name for name in self.features if name != metric)

    def query(self, node: str, metric: str) -> Query:
        """*metric* of *node* cut as this run wants it."""
        return Query(
            node=node,
            metric=metric,
            features=self.features_of(metric),
            lookback=self.time_step,
            horizon=self.horizon,
            interval_seconds=self.interval,
            train_fraction=self.train_test_split,
        )

    def model_config_of(self, metric: str) -> dict[str, str | int | float | bool]:
        """What must be kept beside weights to build the model, and its input, again."""
        kept = self.model_dump(by_alias=True, include=_KEPT)
        return kept | {"metric": metric, "features": ",".join(self.features)}


_KEPT = {
    "interval",
    "time_step",
    "horizon",
    "train_test_split",
    "model",
    "hidden_layer_size",
    "num_layers",
}


def parse(settings_class: type[M], values: Mapping[str, Any], what: str) -> M:
    """*values* as *settings_class*. Raises ConfigError with every bad key of *what*."""
    try:
        return settings_class.model_validate(dict(values))
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            if item["type"] == "missing":
                problems.append(f"{key} is missing")
            elif item["type"] == "extra_forbidden":
                keys = ", ".join(_hyphenated(name) for name in settings_class.model_fields)
                problems.append(f"{key}={item['input']!r}: no such key; there are {keys}")
            else:
                limit = item["msg"].removeprefix("Value error, ")
                problems.append(f"{key}={item['input']!r}: {limit}")
        raise ConfigError(f"bad {what}: {'; '.join(problems)}") from None


def store_settings(host_port: str) -> StoreSettings:
    """host:port as settings of the store."""
    host, _, port = host_port.rpartition(":")
    return StoreSettings(host=host, port=int(port))
