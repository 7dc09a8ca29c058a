"""What a backtest found: tables for a terminal, JSON, a CSV file of every forecast, and a page."""

import base64
import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from icos_fl_client.forecasting.backtest import COMBINATION, SEASONAL_REPEAT, WINDOW_MEAN
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from icos_fl_local import plots
from icos_fl_local.backtest.found import Found, Judged
from icos_fl_local.report import number, percent, render, without_nan, write_file

Entry = dict[str, Any]

CSV_COLUMNS = (
    "node", "origin_unix_s", "time_unix_s", "metric", "step",
    "yhat", "lower_80", "upper_80", "lower_95", "upper_95", "actual",
)  # fmt: skip
LAST = "last"
_SHARE_MIN = 0.5
"""Of the combination's origins, of which the best single forecaster must have said something."""


def as_json(found: Found) -> dict[str, Any]:
    """Plain data, null where there is no number."""
    results = [entry for judged in found.judged for entry in judged.entries()]
    answer = {"source": found.source, "results": results, "notes": found.notes}
    plain: dict[str, Any] = without_nan(answer)
    return plain


def write_csv(file: Path, found: Found) -> None:
    """Every forecast, a row each; empty where there is no number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for judged in found.judged:
        writer.writerows(_csv_rows(judged))
    write_file(file, text.getvalue().encode())


def _csv_rows(judged: Judged) -> Iterator[list[Any]]:
    record = judged.record
    for t, h in np.argwhere(np.isfinite(record.yhat_th)).tolist():
        step = int(record.steps_h[h])
        origin_s = float(judged.end_unix_s_t[t])
        times = [f"{s:.15g}" for s in (origin_s, origin_s + step * judged.interval_seconds)]
        low_95, low_80, high_80, high_95 = record.quantile_tqh[t, :, h]
        values = [record.yhat_th[t, h], low_80, high_80, low_95, high_95, record.actual_th[t, h]]
        shown = ["" if np.isnan(value) else repr(float(value)) for value in values]
        yield [judged.node, *times, judged.metric, step, *shown]


def show(found: Found, console: Console) -> None:
    """Three tables a metric, and what there is no figure of."""
    for metric, entries in _by_metric(found).items():
        console.print(f"{metric}{_in_unit(entries)}, {found.source}", style="bold", highlight=False)
        for title, table in _tables(entries):
            console.print(f"\n  {title}", highlight=False)
            console.print(table, markup=False, highlight=False)
    for line in found.notes:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _tables(entries: Sequence[Entry]) -> Iterator[tuple[str, Table]]:
    yield (
        "mean absolute errors, and as ratios to that of repeating the last value",
        _of_nodes(entries, ERRORS),
    )
    yield (
        "intervals of the combination: what they held, mean width, Winkler score",
        _of_nodes(entries, INTERVALS),
    )
    table = _table("forecaster")
    names, horizons, words = ratios(entries)
    for horizon in horizons:
        table.add_column(horizon, justify="right", no_wrap=True)
    for name in names:
        table.add_row(name, *(words[name, horizon] for horizon in horizons))
    yield "ratios of every forecaster, median / worst over nodes", table


def _by_metric(found: Found) -> dict[str, list[Entry]]:
    by_metric: dict[str, list[Entry]] = {}
    for judged in found.judged:
        by_metric.setdefault(judged.metric, []).extend(judged.entries())
    return by_metric


def _in_unit(entries: Sequence[Entry]) -> str:
    units = sorted({entry["unit"] for entry in entries if entry["unit"]})
    return f" ({', '.join(units)})" if units else ""


ERRORS = {
    "origins": "forecasts",
    "last": "last\nvalue",
    "combination": "combi-\nnation",
    "ratio": "ratio",
    WINDOW_MEAN: "window\nmean",
    SEASONAL_REPEAT: "seasonal\nrepeat",
    "best": "best single one",
}
INTERVALS = {
    f"{what}_{level}": f"{level} %\n{what}"
    for level in ("80", "95")
    for what in ("held", "width", "Winkler")
}
HEADINGS = ERRORS | INTERVALS


def row(entry: Entry) -> dict[str, str]:
    """An entry as words, by HEADINGS; what there is no number of is empty."""
    scores = {score["forecaster"]: score for score in entry["forecasters"]}
    intervals = {interval["percent"]: interval for interval in entry["intervals"]}
    ours = scores[COMBINATION]
    best = best_single(entry)
    words = {
        "origins": f"{ours['origins']:,}",
        "last": number(scores[LAST]["mae"]),
        "combination": number(ours["mae"]),
        "ratio": ratio(ours),
        **{name: ratio(scores.get(name)) for name in (WINDOW_MEAN, SEASONAL_REPEAT)},
        "best": f"{ratio(best)} {best['forecaster']}" if best else "",
    }
    for level in ("80", "95"):
        interval = intervals.get(level)
        words[f"held_{level}"] = percent(interval["coverage"]) if interval else ""
        words[f"width_{level}"] = number(interval["width"]) if interval else ""
        words[f"Winkler_{level}"] = number(interval["winkler"]) if interval else ""
    return words


def best_single(entry: Entry) -> Entry | None:
    """Of those that are combined, in hindsight; None where none can be told from another."""
    least = _SHARE_MIN * entry["forecasters"][0]["origins"]
    there = [
        score
        for score in entry["forecasters"]
        if score["forecaster"] not in (COMBINATION, WINDOW_MEAN, SEASONAL_REPEAT)
        and score["origins"] >= least
        and np.isfinite(score["ratio"])
    ]
    return min(there, key=lambda score: float(score["ratio"]), default=None)


def ratio(score: Entry | None) -> str:
    """To repeating the last value."""
    return f"{score['ratio']:.2f}" if score and np.isfinite(score["ratio"]) else ""


def _of_nodes(entries: Sequence[Entry], headings: Mapping[str, str]) -> Table:
    table = _table("node")
    table.add_column("ahead", justify="right", no_wrap=True)
    for name, heading in headings.items():
        table.add_column(heading, justify="left" if name == "best" else "right", no_wrap=True)
    before = ""
    for entry in entries:
        node, words = entry["node"], row(entry)
        shown = (Text(words[name]) for name in headings)
        table.add_row(Text(node if node != before else ""), entry["horizon"], *shown)
        before = node
    return table


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold")
    return table


def ratios(entries: Sequence[Entry]) -> tuple[list[str], list[str], dict[tuple[str, str], str]]:
    """Forecasters, horizons, and for each two the median and the worst ratio over nodes."""
    found: dict[tuple[str, str], list[float]] = {}
    for entry in entries:
        for score in entry["forecasters"]:
            found.setdefault((score["forecaster"], entry["horizon"]), []).append(score["ratio"])
    longest = max(entries, key=lambda entry: len(entry["forecasters"]))
    names = [score["forecaster"] for score in longest["forecasters"]]
    names += sorted({name for name, _ in found} - {*names})
    ahead = {e["horizon"]: float(e["step"] * e["interval_seconds"]) for e in entries}
    words = {}
    for key, each in found.items():
        known = [value for value in each if np.isfinite(value)]
        worst = f" / {max(known):.2f}" if len(known) > 1 else ""
        words[key] = f"{statistics.median(known):.2f}{worst}" if known else ""
    horizons = sorted(ahead, key=lambda name: ahead[name])
    return names, horizons, {(n, h): words.get((n, h), "") for n in names for h in horizons}


def write_page(file: Path, found: Found) -> None:
    """One page that is by itself: tables, and the newest forecasts of each node and metric."""
    metrics = []
    for metric, entries in _by_metric(found).items():
        names, horizons, words = ratios(entries)
        metrics.append(
            {
                "name": metric,
                "unit": _in_unit(entries),
                "rows": [(entry, row(entry)) for entry in entries],
                "forecasters": names,
                "horizons": horizons,
                "ratios": words,
                "pictures": [
                    (judged.node, base64.b64encode(_picture(judged)).decode())
                    for judged in found.judged
                    if judged.metric == metric
                ],
            }
        )
    page = render(
        "backtest.html",
        source=found.source,
        summary=summary(found),
        metrics=metrics,
        headings={name: _on_one_line(heading) for name, heading in HEADINGS.items()},
        notes=found.notes,
        number=number,
        percent=percent,
        ratio=ratio,
        is_less=_is_less,
    )
    write_file(file, page.encode())


def _on_one_line(heading: str) -> str:
    return heading.replace("-\n", "").replace("\n", " ").replace(" %", "\N{NO-BREAK SPACE}%")


def _picture(judged: Judged) -> bytes:
    return plots.record(f"{judged.node}, {judged.metric}", judged.of_late())


def _is_less(ratio: float) -> bool:
    """By the two digits that are shown: what differs less is no better."""
    return round(ratio, 2) < 1


def summary(found: Found) -> str:
    """One sentence: how often the combination was better than the last value, and by how much."""
    ratios = [
        entry["forecasters"][0]["ratio"] for judged in found.judged for entry in judged.entries()
    ]
    known = [each for each in ratios if np.isfinite(each)]
    if not known:
        return "Repeating the last value never erred, so nothing can be better."
    return (
        f"The combination erred less than repeating the last value in {sum(map(_is_less, known))} "
        f"of {len(known)} (node, metric and horizon); ratio of the errors: median "
        f"{statistics.median(known):.2f}, best {min(known):.2f}, worst {max(known):.2f}."
    )
