"""What the runs of a simulation found: numbers of a run, rows of a sweep, tables and files."""

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from icos_fl_local.run_config import Value
from icos_fl_local.simulation.settings import Setting


@dataclass(frozen=True)
class Error:
    """Of the last round's model on the validation parts: means over all nodes' sequences."""

    mae: float
    """In the metric's unit."""
    last_value: float
    """The same of repeating the last value."""

    @property
    def ratio(self) -> float | None:
        """Below 1 the model is better; None where the last value has no error."""
        return self.mae / self.last_value if self.last_value else None


@dataclass(frozen=True)
class Outcome:
    """One run."""

    setting: Setting
    seed: int
    folder: str
    reason: str
    """Why it failed; empty if it did not."""
    seconds: tuple[float, ...] = ()
    """Of each round."""
    losses: tuple[dict[str, float | None], ...] = ()
    """Of each round by metric: that of the model which the round made."""
    errors: dict[str, Error] = field(default_factory=dict)
    """By metric; without those of which there is none."""
    peak_memory_mib: int = 0

    @property
    def seconds_a_round(self) -> float:
        """The mean after the first round, in which the workers start; of the first if alone."""
        return statistics.fmean(self.seconds[1:] or self.seconds or (0.0,))

    @property
    def ratio(self) -> float | None:
        """The mean of the metrics' ratios."""
        ratios = [error.ratio for error in self.errors.values() if error.ratio is not None]
        return statistics.fmean(ratios) if ratios else None


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds."""

    mean: float
    deviation: float
    """Sample standard deviation; 0 for one seed."""

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.deviation:.2g}" if self.deviation else f"{self.mean:.4g}"


@dataclass(frozen=True)
class Row:
    """One setting, over its seeds. Figures are None where no run has them."""

    setting: Setting
    seeds: tuple[int, ...]
    ratio: Spread | None
    """Error ÷ that of the last value, a mean of all metrics."""
    mae: dict[str, Spread | None]
    last_value: dict[str, Spread | None]
    seconds_a_round: Spread | None
    peak_memory_mib: int
    reason: str
    """Of the first run that failed."""


def outcome(
    setting: Setting, seed: int, folder: Path, history: Mapping[str, Any], peak_memory_mib: int
) -> Outcome:
    """What the history of a finished run says."""
    rounds = history["rounds"]
    losses = tuple(
        {metric: facts["eval_loss"] for metric, facts in entry["metrics"].items()}
        for entry in rounds
    )
    errors = {}
    for entry in rounds:  # a metric that a round left out keeps the error of the round before
        for metric, facts in entry["metrics"].items():
            if facts["mae"] is not None:
                errors[metric] = Error(facts["mae"], facts["naive_mae"])
    seconds = tuple(entry["seconds"] for entry in rounds)
    return Outcome(setting, seed, str(folder), "", seconds, losses, errors, peak_memory_mib)


def rows(outcomes: Sequence[Outcome], metrics: Sequence[str]) -> list[Row]:
    """A row a setting, the smallest ratio first and those without one last."""
    by_setting: dict[str, list[Outcome]] = {}
    for one in outcomes:
        by_setting.setdefault(json.dumps(one.setting), []).append(one)
    made = [_row(group, metrics) for group in by_setting.values()]
    return sorted(made, key=lambda row: (row.ratio is None, row.ratio.mean if row.ratio else 0.0))


def _row(group: Sequence[Outcome], metrics: Sequence[str]) -> Row:
    finished = [one for one in group if not one.reason]
    errors = {m: [one.errors[m] for one in finished if m in one.errors] for m in metrics}
    return Row(
        setting=group[0].setting,
        seeds=tuple(one.seed for one in group),
        ratio=_spread([one.ratio for one in finished]),
        mae={metric: _spread([error.mae for error in errors[metric]]) for metric in metrics},
        last_value={m: _spread([error.last_value for error in errors[m]]) for m in metrics},
        seconds_a_round=_spread([one.seconds_a_round for one in finished]),
        peak_memory_mib=max(one.peak_memory_mib for one in group),
        reason=next((one.reason for one in group if one.reason), ""),
    )


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0)


def rounds_table(outcomes: Sequence[Outcome], metrics: Sequence[str]) -> Table:
    """The rounds of one setting: seconds, and the loss of each metric; means over the seeds."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("round", "seconds", *(f"loss of {metric}" for metric in metrics)):
        table.add_column(heading, justify="right")
    finished = [one for one in outcomes if not one.reason]
    for index in range(max((len(one.seconds) for one in finished), default=0)):
        seconds = _spread([one.seconds[index] for one in finished])
        losses = [_spread([one.losses[index].get(m) for one in finished]) for m in metrics]
        table.add_row(str(index + 1), *map(_text, (seconds, *losses)))
    return table


def errors_table(row: Row) -> Table:
    """One setting: the error of each metric against that of the last value."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("metric", "federated model", "last value", "model ÷ last value"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for metric, mae in row.mae.items():
        naive = row.last_value[metric]
        ratio = f"{mae.mean / naive.mean:.3f}" if mae and naive and naive.mean else "-"
        table.add_row(metric, _text(mae), _text(naive), ratio)
    return table


def sweep_table(made: Sequence[Row]) -> Table:
    """A row a setting, best first."""
    table = Table(box=box.SIMPLE_HEAD)
    first = made[0]
    headings = [*first.setting, "÷ last value", *(f"error of {metric}" for metric in first.mae)]
    for heading in (*headings, "s a round", "peak MiB"):
        table.add_column(heading, justify="right")
    for row in made:
        figures = [_text(row.ratio), *(_text(mae) for mae in row.mae.values())]
        table.add_row(
            *map(str, row.setting.values()), *figures,
            _text(row.seconds_a_round), str(row.peak_memory_mib),
        )  # fmt: skip
    return table


def _text(figure: Spread | None) -> str:
    return "-" if figure is None else str(figure)


def write(
    folder: Path, facts: Mapping[str, Any], outcomes: Sequence[Outcome], made: Sequence[Row]
) -> list[Path]:
    """``results.json`` and ``results.csv`` in *folder*; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "results.json", folder / "results.csv"]
    for file, text in zip(files, (json.dumps(as_json(facts, outcomes, made), indent=1), _csv(made)),
                          strict=True):  # fmt: skip
        temporary = file.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(file)
    return files


def as_json(
    facts: Mapping[str, Any], outcomes: Sequence[Outcome], made: Sequence[Row]
) -> dict[str, Any]:
    """All there is: *facts*, then ``table`` with a row a setting, and ``runs``."""
    runs = [
        asdict(one) | {"seconds_a_round": one.seconds_a_round, "ratio": one.ratio}
        for one in outcomes
    ]
    return {**facts, "table": [asdict(row) for row in made], "runs": runs}


def _csv(made: Sequence[Row]) -> str:
    text = io.StringIO()
    rows = [_flat(row) for row in made]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: Row) -> dict[str, Value | None]:
    flat: dict[str, Value | None] = {**row.setting, "seeds": len(row.seeds)}
    figures = {
        "ratio": row.ratio,
        **{f"{metric}_mae": mae for metric, mae in row.mae.items()},
        **{f"{metric}_last_value": naive for metric, naive in row.last_value.items()},
        "seconds_a_round": row.seconds_a_round,
    }
    for name, figure in figures.items():
        flat[name] = figure.mean if figure else None
        flat[f"{name}_deviation"] = figure.deviation if figure else None
    return flat | {"peak_memory_mib": row.peak_memory_mib, "reason": row.reason}
