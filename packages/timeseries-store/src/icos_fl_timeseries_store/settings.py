"""Settings from the environment, read once in a process's ``__main__``.

pydantic-settings ignores a variable that it does not know, so a misspelt one would silently leave
its default in force: ``load`` refuses it instead.
"""

import difflib
import os
import sys
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings

S = TypeVar("S", bound=BaseSettings)


class StoreSettings(BaseModel):
    """Where the store is. Part of the settings of every service that uses it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    """Host of dataClay's metadata service."""
    port: int = Field(default=16587, ge=1, le=65535)
    """Port of dataClay's metadata service."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """The longest that a call may take before it raises StoreUnavailable."""


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
            problems.append(f"{variable}={item['input']!r}: {item['msg']}")
        settings = None
    if problems or settings is None:
        raise SettingsError("\n".join(problems))
    return settings


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
