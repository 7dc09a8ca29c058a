"""Settings from the environment, read once in a process's ``__main__``.

pydantic-settings ignores a variable that it does not know, so a misspelt one would silently leave
its default in force: ``load`` refuses it instead.
"""

import difflib
import os
import sys
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings

S = TypeVar("S", bound=BaseSettings)


class ServiceSettings(BaseSettings):
    """Settings that every service has; its own class derives from it, with its ``env_prefix``."""

    metrics_address: str = Field(default="", pattern=r"^(\S+:\d{1,5})?$")
    """host:port to serve Prometheus' /metrics on; port 0 takes a free one. Empty: off."""
    metrics_otlp_endpoint: str = Field(default="", pattern=r"^(https?://\S+)?$")
    """Where the same metrics are exported to, over OTLP/gRPC; https is TLS. Empty: off."""

    @property
    def has_metrics(self) -> bool:
        """Does anybody get the metrics?"""
        return bool(self.metrics_address or self.metrics_otlp_endpoint)


class SettingsError(Exception):
    """Settings that cannot be used; the message has one line for each bad variable."""


def load(settings_class: type[S]) -> S:
    """Read *settings_class* from the environment.

    Raises SettingsError, which lists every bad and every unknown variable of the class's prefix.
    """
    prefix = settings_class.model_config.get("env_prefix", "").upper()
    delimiter = settings_class.model_config.get("env_nested_delimiter") or "__"
    known = {f"{prefix}{name}".upper() for name in _variables(settings_class, delimiter)}
    problems = []
    for name in sorted(os.environ):
        if name.upper().startswith(prefix) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{name}: no such setting{hint}")
    try:
        settings = settings_class()
    except ValidationError as error:
        for item in error.errors():
            variable = prefix + delimiter.join(str(part) for part in item["loc"]).upper()
            # What no single variable is to blame for would be told with all of them.
            told = f"{variable}={item['input']!r}" if item["loc"] else f"{prefix}*"
            problems.append(f"{told}: {item['msg'].removeprefix('Value error, ')}")
        settings = None
    if problems or settings is None:
        raise SettingsError("\n".join(problems))
    return settings


def refuse_arguments(about: str, prefix: str) -> None:
    """Of a command without any: ends it with 2, or with 0 where help was asked for."""
    if len(sys.argv) > 1:
        print(f"{about}\n\nSettings come from {prefix}* variables.")
        raise SystemExit(0 if sys.argv[1] in ("-h", "--help") else 2)


def load_or_exit(settings_class: type[S]) -> S:
    """``load`` for a command: prints the problems and exits with 2."""
    try:
        return load(settings_class)
    except SettingsError as error:
        for problem in str(error).splitlines():
            print(f"{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
        raise SystemExit(2) from None


def _variables(model: type[BaseModel], delimiter: str) -> list[str]:
    names = []
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            names += [f"{name}{delimiter}{inner}" for inner in _variables(annotation, delimiter)]
        else:
            names.append(name)
    return names


def split_address(address: str) -> tuple[str, int]:
    """Host and port of host:port; an IPv6 host stands in brackets."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)
