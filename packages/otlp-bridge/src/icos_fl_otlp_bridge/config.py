"""The bridge's configuration file: which resources, which metrics, which columns. YAML 1.2."""

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedBase, CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from icos_fl_otlp_bridge.errors import ConfigError
from icos_fl_otlp_bridge.measures import Take

ROWS_MAX = 10_000_000
COLUMNS_MAX = 1_000
NODES_MAX = 1_000_000
NUMBER_CHARACTERS_MAX = 40
READ_CHARACTERS_MAX = 100
_KINDS = ("str", "int", "float", "bool", "null", "merge")


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number is needed")
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_number)]
Text = Annotated[str, Field(min_length=1)]
Scalar = str | int | float | bool
Combine = Literal["sum", "mean", "min", "max", "last"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Predicate(_Model):
    """A condition on one attribute. An absent attribute is no match, whatever the condition."""

    attribute: Text
    equals: Scalar | None = None
    one_of: tuple[Scalar, ...] | None = None
    matches: str | None = None
    """A regular expression for the whole value."""
    exists: Literal[True] | None = None

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        given = [
            n for n in ("equals", "one_of", "matches", "exists") if getattr(self, n) is not None
        ]
        if len(given) != 1:
            raise ValueError(f"exactly one of equals, one_of, matches, exists; given: {given}")
        if self.matches is not None:
            try:
                re.compile(self.matches)
            except re.error as error:
                raise ValueError(f"matches: {error}") from None
        return self

    def accepts(self, attributes: dict[str, Any]) -> bool:
        """Does the attribute, if it is there, meet the condition?"""
        if self.attribute not in attributes:
            return False
        value = attributes[self.attribute]
        if self.equals is not None:
            return bool(value == self.equals)
        if self.one_of is not None:
            return value in self.one_of
        if self.matches is not None:
            return re.fullmatch(self.matches, str(value)) is not None
        return True


class Term(_Model):
    """One metric's contribution to a column."""

    metric: Text
    where: tuple[Predicate, ...] = ()
    """Which of its series, by the attributes of their points; all of them without."""
    take: Take = "value"
    """``value`` of a gauge or sum; the others of a histogram or summary."""
    quantile: Number | None = Field(default=None, ge=0, le=1)
    """Which, where ``take`` is ``quantile``."""
    rate: StrictBool = False
    """Change a second instead of the number itself: for what counts."""
    combine: Combine = "sum"
    """How the values of several series become one."""
    factor: Number = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.take == "quantile") != (self.quantile is not None):
            raise ValueError("take: quantile and quantile: 0.5 (0 to 1) need each other")
        if self.rate and self.take in ("mean", "quantile"):
            raise ValueError(f"a rate of a {self.take}: only value, count and sum count something")
        return self


class Source(_Model):
    """One way to fill a column: (sum of factor x term, + plus) * multiply_by / divide_by."""

    terms: tuple[Term, ...] = Field(min_length=1)
    plus: Number = 0.0
    multiply_by: Number = 1.0
    divide_by: Number = 1.0
    """Where a unit is a whole multiple of another, dividing is exact and multiplying is not."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.divide_by == 0:
            raise ValueError("divide_by is 0")
        return self


class Column(_Model):
    """A column of the window."""

    unit: str = ""
    sources: tuple[Source, ...] = Field(min_length=1)
    """The first of them whose terms are all there fills a row."""


class BridgeConfig(_Model):
    """The whole file."""

    node_attribute: Text = "host.name"
    """The resource attribute that names the node."""
    resources: tuple[Predicate, ...] = ()
    """All must accept a resource; the points of others are not for this bridge."""
    interval_seconds: Number = Field(default=3.0, ge=0.001, le=86_400)
    """A row's time is its points' time rounded down to this."""
    window_rows: Whole = Field(default=300, ge=1, le=ROWS_MAX)
    """Rows that a node's window holds."""
    nodes_max: Whole = Field(default=1_000, ge=1, le=NODES_MAX)
    """Nodes whose points are taken."""
    columns: dict[Text, Column] = Field(
        default_factory=lambda: default_config().columns, min_length=1, max_length=COLUMNS_MAX
    )
    """By name; the packaged ones where a file names none."""
    more_columns: dict[Text, Column] = Field(default_factory=dict)
    """Beside ``columns``: so the packaged ones need not be repeated to have others too."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if twice := sorted(self.columns.keys() & self.more_columns.keys()):
            raise ValueError(f"more_columns has {twice[0]}, which is a column already")
        if len(self.all_columns) > COLUMNS_MAX:
            raise ValueError(f"{len(self.all_columns)} columns; {COLUMNS_MAX} are the limit")
        return self

    @property
    def all_columns(self) -> dict[str, Column]:
        """By name."""
        return {**self.columns, **self.more_columns}

    @property
    def metrics(self) -> frozenset[str]:
        """Names of the metrics that some column is made of."""
        sources = (source for column in self.all_columns.values() for source in column.sources)
        return frozenset(term.metric for source in sources for term in source.terms)

    @property
    def interval_ns(self) -> int:
        return round(self.interval_seconds * 1e9)


def default_config() -> BridgeConfig:
    """The packaged one: Scaphandre, the Collector's hostmetrics, the SDK's system metrics."""
    file = files("icos_fl_otlp_bridge").joinpath("default.yaml")
    return _parse(file.read_text(), file.name)


def load_config(path: Path) -> BridgeConfig:
    """Read *path*. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    return _parse(text, str(path))


def _parse(text: str, name: str) -> BridgeConfig:
    try:
        problems = list(_surprises(text))
        document = None if problems else YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 0
        read = text.splitlines()[line - 1].strip() if 0 < line <= len(text.splitlines()) else ""
        problem = (error.problem or error.context or "not YAML").split("\n")[0]
        raise ConfigError(f"{name}, line {line}: {problem}; read: {_short(read)}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        read = text[error.position : error.position + 1]
        raise ConfigError(f"{name}, line {line}: no character of YAML; read: {read!r}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        problem = str(error).split("\n")[0]
        raise ConfigError(f"{name}: not a YAML document: {problem}") from None
    if problems:
        raise ConfigError("\n".join(f"{name}, {problem}" for problem in problems))
    if not isinstance(document, CommentedMap):
        raise ConfigError(f"{name}: a mapping is needed; read: {_short(document)}")
    try:
        return BridgeConfig.model_validate(document)
    except ValidationError as error:
        faults = [(item["loc"], item["msg"], item["input"]) for item in error.errors()]
        places = [place for place, _, _ in faults]
        raise ConfigError(
            "\n".join(
                f"{name}, line {_line(document, place)}: {_dotted(place)}: "
                f"{message.removeprefix('Value error, ')}; read: {_short(read)}"
                for place, message, read in faults
                # A list that holds a fault is then said to be too short as well.
                if not any(len(p) > len(place) and p[: len(place)] == place for p in places)
            )
        ) from None


def _surprises(text: str) -> Iterator[str]:
    """What another reader of YAML would take for another value: refused, never guessed at."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("%YAML") and line.split()[1:2] != ["1.2"]:
            yield f"line {number}: the file is read as YAML 1.2; read: {_short(line)}"
    document = YAML(typ="rt", pure=True).compose(text)
    seen = set()
    left: list[tuple[tuple[str, ...], Any]] = [((), document)] if document else []
    while left:
        path, node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, MappingNode):
            left += [((*path, str(key.value)), child) for key, child in reversed(node.value)]
        elif isinstance(node, SequenceNode):
            numbered = list(enumerate(node.value))
            left += [((*path, str(index)), child) for index, child in reversed(numbered)]
        else:
            kind = str(node.tag).rpartition(":")[2]
            problem = ""
            if kind in ("int", "float") and "_" in node.value:
                problem = "write the number without underscores"
            elif kind in ("int", "float") and len(node.value) > NUMBER_CHARACTERS_MAX:
                problem = f"a number of more than {NUMBER_CHARACTERS_MAX} characters"
            elif kind not in _KINDS:
                problem = "neither a text, a number, nor true or false"
            if problem:
                line = node.start_mark.line + 1
                yield f"line {line}: {_dotted(path)}: {problem}; read: {_short(node.value)}"


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _short(read: object) -> str:
    text = repr(read)
    return text if len(text) <= READ_CHARACTERS_MAX else f"{text[:READ_CHARACTERS_MAX]}…"


def _line(document: Any, path: tuple[str | int, ...]) -> int:
    """Line of the deepest part of *path* that is in the file."""
    node, line = document, 1
    for key in path:
        if not isinstance(node, CommentedBase):
            break
        try:
            line = _line_of(node, key)
            node = node[key]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            break
    return line


def _line_of(node: Any, key: str | int) -> int:
    position = node.lc.key(key) if isinstance(node, CommentedMap) else node.lc.item(key)
    return int(position[0]) + 1
