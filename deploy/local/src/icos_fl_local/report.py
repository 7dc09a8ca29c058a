"""What a deployment found: a table for the terminal, plots, a page and the result as JSON.

The *result* has ``nodes``, ``metrics``, ``backtest`` and ``forecast`` (as `icos-fl-client` prints
them), ``history`` (as the ServerApp writes it), ``stages`` (name and seconds) and ``source``.
"""

import base64
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from icos_fl_local import plots

Result = dict[str, Any]

FORECASTERS = {
    "federated": "federated model",
    "last_value": "last value",
    "window_mean": "window mean",
}
_AHEAD_SECONDS = 300.0
_COMBINED = (
    "Nodes do not forecast by it alone: they combine it with their own past, which icos-fl "
    "forecast tells of a node that runs. What that is worth tells icos-fl backtest --traces."
)


@dataclass(frozen=True)
class Row:
    """One node and metric, in words and units. A part that is not there is empty."""

    node: str
    metric: str
    unit: str
    errors: dict[str, str]
    """Mean absolute error by forecaster."""
    best: str
    ratio: str
    """Error of the federated model ÷ that of repeating the last value."""
    coverage: str
    ahead: str
    """The last value → the forecast, with its 80 % interval."""
    ahead_span: str
    """How far ahead: five minutes, or the nearest that the horizon has."""


def write(folder: Path, result: Result) -> list[Path]:
    """Write result.json, the plots and index.html into *folder*; return them, the page first."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json = json.dumps(without_nan(result), indent=1, ensure_ascii=False, allow_nan=False)
    written = [write_file(folder / "result.json", as_json.encode())]
    pictures = []
    names: set[str] = set()
    for entry in result["backtest"].get("results", []):
        if entry.get("plot"):
            title = f"{entry['node']} · {entry['metric']}"
            name = _file_name(f"forecast-{entry['node']}-{entry['metric']}", names)
            pictures.append((entry["metric"], title, name, plots.forecast(title, entry)))
    if loss := plots.loss(result["history"], result["metrics"]):
        pictures.append(("", "Loss a round", _file_name("loss", names), loss))
    written += [write_file(folder / name, png) for _, _, name, png in pictures]
    return [write_file(folder / "index.html", _page(result, pictures).encode()), *written]


def rows(result: Result) -> list[Row]:
    """The table's rows: each node and metric of which there is an error or a forecast."""
    errors = {(e["node"], e["metric"]): e for e in result["backtest"].get("results", [])}
    ahead = {(e["node"], e["metric"]): e for e in result["forecast"].get("forecasts", [])}
    pairs = [(node, metric) for node in result["nodes"] for metric in result["metrics"]]
    return [
        _row(node, metric, errors.get((node, metric)), ahead.get((node, metric)))
        for node, metric in pairs
        if (node, metric) in errors or (node, metric) in ahead
    ]


def unavailable(result: Result) -> list[str]:
    """One line for each node and metric without a backtest or a forecast, with the reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for what in ("backtest", "forecast"):
        for entry in result[what].get("unavailable", []):
            key = (entry["node"], entry["metric"], entry["reason"])
            reasons.setdefault(key, []).append(what)
    return [
        f"{node}, {metric}: no {' and no '.join(what)}: {reason}"
        for (node, metric, reason), what in reasons.items()
    ]


def summary(result: Result) -> str:
    """How often the federated model was best, what its interval was worth, and what it is for."""
    entries = result["backtest"].get("results", [])
    if not entries:
        return "No error could be computed: no node had a usable sequence in its validation part."
    best = sum(entry["best"] == "federated" for entry in entries)
    pairs = "1 pair" if len(entries) == 1 else f"{len(entries)} pairs"
    text = f"The federated model was the best of the three in {best} of {pairs} of node and metric"
    coverage = pooled_coverage(result)
    if coverage is None:
        return f"{text}. {_COMBINED}"
    return f"{text}; its 80 % interval held {percent(coverage)} of what then came. {_COMBINED}"


def pooled_coverage(result: Result) -> float | None:
    """The share of all forecast values, over all nodes and metrics, inside the 80 % interval."""
    entries = [
        (entry["coverage"]["80"], entry["values"])
        for entry in result["backtest"].get("results", [])
        if entry["coverage"].get("80") is not None
    ]
    values = sum(count for _, count in entries)
    return sum(share * count for share, count in entries) / values if values else None


def table(result: Result) -> Table:
    """The table for a terminal; the best of the three errors is bold and has a star.

    Below it stands in words what it comes to, and what is not in it.
    """
    return _table(result, box.SIMPLE_HEAD)


def text(result: Result, width: int = 120) -> str:
    """The same in plain characters, for where no terminal is."""
    written = io.StringIO()
    Console(file=written, width=width, color_system=None).print(_table(result, box.ASCII))
    return written.getvalue()


def _table(result: Result, lines: box.Box) -> Table:
    shown = Table(
        title="The federated model alone, on rows that no node trained on (* least mean error)",
        title_justify="left",
        caption=Text("\n".join([summary(result), *unavailable(result)])),
        caption_justify="left",
        box=lines,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    shown.add_column("node", overflow="fold")
    shown.add_column("metric", overflow="fold")
    shown.add_column("unit")
    # Numbers are never cut; in a narrow terminal the words fold.
    for heading in ("federated", "last\nvalue", "window\nmean", "÷ last\nvalue", "80 %\nheld"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column(_ahead_heading(rows(result)), overflow="fold")
    before = ""
    for row in rows(result):
        errors = [
            Text(f"{row.errors[name]} *", "bold green") if name == row.best else row.errors[name]
            for name in FORECASTERS
        ]
        shown.add_row(
            Text(row.node if row.node != before else ""),
            Text(row.metric),
            Text(row.unit),
            *errors,
            row.ratio,
            row.coverage,
            Text(row.ahead),
        )
        before = row.node
    return shown


def _row(node: str, metric: str, errors: Result | None, ahead: Result | None) -> Row:
    unit = (errors or ahead or {}).get("unit", "")
    mae = errors["mae"] if errors else {}
    naive, federated = mae.get("last_value"), mae.get("federated")
    coverage = errors["coverage"].get("80") if errors else None
    words, span = _ahead(ahead) if ahead else ("", "")
    return Row(
        node=node,
        metric=metric,
        unit=unit,
        errors={name: number(mae.get(name)) for name in FORECASTERS},
        best=errors["best"] if errors else "",
        ratio=f"{federated / naive:.2f}" if naive and federated is not None else "",
        coverage=percent(coverage) if coverage is not None else "",
        ahead=words,
        ahead_span=span,
    )


def _ahead(forecast: Result) -> tuple[str, str]:
    """Such as ``188 → 192 (175 to 210)`` and ``5 min``; empty where nothing is forecast.

    Without an interval where too few errors are known for one.
    """
    last = forecast["last_time_unix_s"]
    steps = forecast["time_unix_s"]
    if not steps:
        return "", ""
    step = min(range(len(steps)), key=lambda i: abs(steps[i] - last - _AHEAD_SECONDS))
    seconds = steps[step] - last
    now, then, low, high = (
        number(value)
        for value in (
            forecast["last_value"],
            forecast["yhat"][step],
            forecast["lower_80"][step],
            forecast["upper_80"][step],
        )
    )
    span = f"{seconds / 60:.3g} min" if seconds >= 60 else f"{seconds:.0f} s"
    interval = f" ({low} to {high})" if low and high else ""
    return f"{now} → {then}{interval}", span


def _ahead_heading(shown: list[Row]) -> str:
    spans = sorted({row.ahead_span for row in shown if row.ahead_span})
    return f"next {' or '.join(spans)} (80 %)"


def number(value: float | None) -> str:
    """A number with about three digits that mean something; empty for none."""
    if value is None or not math.isfinite(value):
        return ""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or size == 0 else 4
    return f"{value:,.{digits}f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def render(template: str, **facts: Any) -> str:
    """A page that is one file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template).render(made=made, **facts)


def _page(result: Result, pictures: list[tuple[str, str, str, bytes]]) -> str:
    return render(
        "report.html",
        rows=rows(result),
        ahead_heading=_ahead_heading(rows(result)),
        forecasters=FORECASTERS,
        summary=summary(result),
        unavailable=unavailable(result),
        nodes=result["nodes"],
        metrics=result["metrics"],
        history=result["history"],
        node_problems=list(_node_problems(result["history"])),
        stages=result["stages"],
        source=result["source"]
        if isinstance(result["source"], dict)
        else {"source": result["source"]},
        backtest=result["backtest"].get("results", []),
        pictures=[
            {"metric": metric, "title": title, "png": base64.b64encode(png).decode()}
            for metric, title, _, png in pictures
        ],
    )


def _node_problems(history: Result) -> Iterator[str]:
    for entry in history.get("rounds", []):
        if entry.get("reason"):
            yield f"round {entry['round']}: {entry['reason']}"
        for node, outcome in entry.get("nodes", {}).items():
            if outcome["state"] != "ok":
                yield f"round {entry['round']}, {node}: {outcome['state']}: {outcome['cause']}"


def _file_name(name: str, taken: set[str]) -> str:
    """A name that any file system takes; node and metric names may have any character."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
    candidate, again = f"{stem}.png", 2
    while candidate.lower() in taken:
        candidate, again = f"{stem}-{again}.png", again + 1
    taken.add(candidate.lower())
    return candidate


def write_file(file: Path, data: bytes) -> Path:
    """Write at once: whoever looks sees the old file or the new one."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_bytes(data)
    return temporary.replace(file)


def without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return value
