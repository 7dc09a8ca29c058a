"""What a deployment found: a table for the terminal, plots, a page and the result as JSON.

The *result* has ``nodes``, ``metrics``, ``backtest`` and ``forecast`` (as `icos-fl-client` prints
them, of the federated model alone), ``combination`` (as `backtest.combined` gives it: what nodes
say), ``history`` (as the ServerApp writes it), ``stages`` (name and seconds) and ``source``.
"""

import base64
import functools
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
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
from icos_fl_local.run_config import FORECAST_SECONDS

Result = dict[str, Any]

LAST, COMBINATION, FEDERATED = "last_value", "combination", "federated"


@dataclass(frozen=True)
class Row:
    """One node and metric, in words and units. A part that is not there is empty."""

    node: str
    metric: str
    unit: str
    last: str
    """Mean absolute error of repeating the last value."""
    combination: str
    """That of what the node says."""
    ratio: str
    """The second ÷ the first."""
    federated: str
    """The same ratio of the federated model alone."""
    best: str
    """LAST, COMBINATION or FEDERATED; empty where two are as good."""
    coverage: str
    """Of the combination's 80 % interval."""
    ahead: str
    """The last value → what the node says, with its 80 % interval."""
    ahead_seconds: float
    """How far ahead all of this is: five minutes, or the nearest that there is."""


def write(folder: Path, result: Result) -> list[Path]:
    """Write result.json, the plots and index.html into *folder*; return them, the page first."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json = json.dumps(without_nan(result), indent=1, ensure_ascii=False, allow_nan=False)
    written = [write_file(folder / "result.json", as_json.encode())]
    pictures = []
    names: set[str] = set()
    for (node, metric), draw in _plots(result).items():
        title = f"{node} · {metric}"
        name = _file_name(f"forecast-{node}-{metric}", names)
        pictures.append((metric, title, name, draw(title)))
    if loss := plots.loss(result["history"], result["metrics"]):
        pictures.append(("", "Loss a round", _file_name("loss", names), loss))
    written += [write_file(folder / name, png) for _, _, name, png in pictures]
    return [write_file(folder / "index.html", _page(result, pictures).encode()), *written]


def _plots(result: Result) -> dict[tuple[str, str], Callable[[str], bytes]]:
    """By node and metric what draws a plot, given its title.

    Of what the node says, else of the federated model alone.
    """
    alone: dict[tuple[str, str], Callable[[str], bytes]] = {
        (entry["node"], entry["metric"]): functools.partial(plots.forecast, entry=entry)
        for entry in result["backtest"].get("results", [])
        if entry.get("plot")
    }
    said: dict[tuple[str, str], Callable[[str], bytes]] = {
        (entry["node"], entry["metric"]): functools.partial(plots.record, entry=entry["plot"])
        for entry in result["combination"].get("results", [])
        if entry["origins"]
    }
    return alone | said


def rows(result: Result) -> list[Row]:
    """The table's rows: each node and metric of which there is an error or a forecast."""
    alone = {(e["node"], e["metric"]): e for e in result["backtest"].get("results", [])}
    said = {(e["node"], e["metric"]): e for e in result["combination"].get("results", [])}
    pairs = [(node, metric) for node in result["nodes"] for metric in result["metrics"]]
    return [
        _row(*pair, alone.get(pair), said.get(pair))
        for pair in pairs
        if pair in alone or pair in said
    ]


def notes(result: Result) -> list[str]:
    """One line for each node and metric without a backtest or a forecast, with the reason.

    And what must be known of the combination.
    """
    reach_s = {
        (entry["node"], entry["metric"]): entry["horizon"] * entry["interval_seconds"]
        for entry in result["backtest"].get("results", [])
    }
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for what in ("backtest", "forecast"):
        for entry in result[what].get("unavailable", []):
            key = (entry["node"], entry["metric"], entry["reason"])
            reasons.setdefault(key, []).append(what)
    return [
        *(
            f"{node}, {metric}: no {' and no '.join(what)}: {reason}"
            for (node, metric, reason), what in reasons.items()
        ),
        *(
            f"{row.node}, {row.metric}: the federated model forecasts {_duration(seconds)} ahead, "
            f"not {_duration(row.ahead_seconds)}"
            for row in rows(result)
            if (seconds := reach_s.get((row.node, row.metric), math.inf)) < row.ahead_seconds
        ),
        *result["combination"].get("notes", []),
    ]


def summary(result: Result) -> str:
    """How often, and by how much, nodes are told better than by the last value.

    By the ratios that the table shows: what differs less is no better.
    """
    shown = rows(result)
    sentences = [
        f"{who} better than the last value in {sum(ratio < 1 for ratio in ratios)} of "
        f"{len(ratios)} pairs of node and metric: {statistics.median(ratios):.2f} of its error in "
        f"the median, {max(ratios):.2f} at worst."
        for who, ratios in (
            (
                "The combination, which is what a node says, is",
                [float(row.ratio) for row in shown if row.ratio],
            ),
            (
                "The federated model alone is",
                [float(row.federated) for row in shown if row.federated],
            ),
        )
        if ratios
    ]
    if not sentences:
        return "No error could be computed."
    if (coverage := pooled_coverage(result)) is not None:
        held = f"The combination's 80 % interval held {percent(coverage)} of what then came."
        sentences.append(held)
    return " ".join(sentences)


def pooled_coverage(result: Result) -> float | None:
    """The share of all forecasts, over all nodes and metrics, inside the node's 80 % interval."""
    entries = [
        (entry["coverage"]["80"], entry["origins"])
        for entry in result["combination"].get("results", [])
        if entry["coverage"].get("80") is not None
    ]
    values = sum(count for _, count in entries)
    return sum(share * count for share, count in entries) / values if values else None


def table(result: Result) -> Table:
    """The table for a terminal; the least of the three errors is bold and has a star.

    Below it stands in words what it comes to, and what is not in it.
    """
    return _table(result, box.SIMPLE_HEAD)


def text(result: Result, width: int = 120) -> str:
    """The same in plain characters, for where no terminal is."""
    written = io.StringIO()
    Console(file=written, width=width, color_system=None).print(_table(result, box.ASCII))
    return written.getvalue()


def _table(result: Result, lines: box.Box) -> Table:
    found = rows(result)
    span = _span(found)
    shown = Table(
        title=f"Mean errors {span} ahead, on rows that no node trained on (* the least)",
        title_justify="left",
        caption=Text("\n".join([summary(result), *notes(result)])),
        caption_justify="left",
        box=lines,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    shown.add_column("node", overflow="fold")
    shown.add_column("metric", overflow="fold")
    shown.add_column("unit")
    # Numbers are never cut; in a narrow terminal the words fold.
    for heading in (
        "last\nvalue",
        "combi-\nnation",
        "÷ last\nvalue",
        "federated\n÷ last",
        "80 %\nheld",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column(f"combination, in {span} (80 %)", overflow="fold")
    before = ""
    for row in found:
        shown.add_row(
            Text(row.node if row.node != before else ""),
            Text(row.metric),
            Text(row.unit),
            _starred(row.last, row.best == LAST),
            row.combination,
            _starred(row.ratio, row.best == COMBINATION),
            _starred(row.federated, row.best == FEDERATED),
            row.coverage,
            Text(row.ahead),
        )
        before = row.node
    return shown


def _starred(number: str, is_best: bool) -> Text:
    return Text(f"{number} *", "bold green") if is_best else Text(number)


def _row(node: str, metric: str, alone: Result | None, said: Result | None) -> Row:
    """*alone* is of the federated model, *said* of the combination."""
    interval_s = (said or alone or {})["interval_seconds"]
    step = said["step"] if said else _step_ahead(alone or {})
    model, naive = _alone_ahead(alone, step * interval_s) if alone else (None, None)
    # Of the same rows on the same grid as the combination's, where there is one.
    last = said["last_value_mae"] if said and said["mae"] is not None else naive
    ratio = f"{said['ratio']:.2f}" if said and said["ratio"] is not None else ""
    federated = f"{model / naive:.2f}" if naive and model is not None else ""
    return Row(
        node=node,
        metric=metric,
        unit=(said or alone or {}).get("unit", ""),
        last=number(last),
        combination=number(said["mae"]) if said else "",
        ratio=ratio,
        federated=federated,
        best=_best({LAST: "1.00" if last else "", COMBINATION: ratio, FEDERATED: federated}),
        coverage=percent(said["coverage"]["80"]) if said and "80" in said["coverage"] else "",
        ahead=_ahead(said) if said else "",
        ahead_seconds=step * interval_s,
    )


def _alone_ahead(alone: Result, ahead_s: float) -> tuple[float | None, float | None]:
    """Errors of the federated model and of the last value, of a step that ends *ahead_s* later."""
    steps = round(ahead_s / alone["interval_seconds"])
    if not math.isclose(steps * alone["interval_seconds"], ahead_s) or steps > alone["horizon"]:
        return None, None
    by_step = alone["mae_by_step"]
    return by_step[FEDERATED][steps - 1], by_step[LAST][steps - 1]


def _best(ratios: dict[str, str]) -> str:
    """The one with the least ratio; none where another one shows the same."""
    known = {name: float(ratio) for name, ratio in ratios.items() if ratio}
    least = [name for name, ratio in known.items() if ratio == min(known.values())]
    return least[0] if len(least) == 1 and len(known) > 1 else ""


def _step_ahead(alone: Result) -> int:
    steps = range(1, alone["horizon"] + 1)
    return min(steps, key=lambda step: abs(step * alone["interval_seconds"] - FORECAST_SECONDS))


def _ahead(said: Result) -> str:
    """Such as ``188 → 192 (175 to 210)``; without an interval where too few errors are known."""
    names = ("last_value", "yhat", "lower_80", "upper_80")
    now, then, low, high = (number(said[name]) for name in names)
    if not then:
        return ""
    return f"{now} → {then} ({low} to {high})" if low and high else f"{now} → {then}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.3g} min" if seconds >= 60 else f"{seconds:.0f} s"


def _span(shown: list[Row]) -> str:
    spans = sorted({row.ahead_seconds for row in shown}) or [FORECAST_SECONDS]
    return " or ".join(map(_duration, spans))


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
        span=_span(rows(result)),
        summary=summary(result),
        notes=notes(result),
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
