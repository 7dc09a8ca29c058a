"""Plots as PNG, drawn without a display. Times are UTC; colours are told apart by everybody."""

import io
import math
from datetime import UTC
from typing import Any

import matplotlib.dates as dates
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

POINTS_MAX = 1_200
"""The most points of a line; a longer one keeps the lowest and highest value of each stretch."""

PANELS_A_ROW = 3

# Okabe and Ito's palette.
_PAST, _FORECAST, _CAME, _OTHER = "#444444", "#0072B2", "#D55E00", "#009E73"
_GRID = "#dddddd"


def forecast(title: str, entry: dict[str, Any]) -> bytes:
    """A window, the forecast from its end with its intervals, and what then came.

    *entry* is one of a backtest's results, with ``plot``, ``unit`` and ``interval_seconds``.
    """
    data = {name: _floats(values) for name, values in entry["plot"].items()}
    figure, (axes,) = _figure(1)
    past_s, past = thin(data["window_time_unix_s"], data["window"])
    ahead_s = data["time_unix_s"]
    _intervals(axes, data)
    axes.plot(_days(past_s), past, color=_PAST, linewidth=1.4, label="window")
    # The line of what came begins where the window ends: it is one series.
    came_s = np.concatenate([data["window_time_unix_s"][-1:], ahead_s])
    came = np.concatenate([data["window"][-1:], data["actual"]])
    axes.plot(_days(came_s), came, color=_CAME, linewidth=1.8, label="what came")
    axes.plot(_days(ahead_s), data["yhat"], color=_FORECAST, linewidth=2.2, label="forecast")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_ylabel(entry["metric"] + (f" ({entry['unit']})" if entry["unit"] else ""))
    _time_axis(axes)
    axes.margins(x=0.01)
    _limit(axes, data)
    _legend(figure, axes)
    return _png(figure)


def record(title: str, entry: dict[str, Any]) -> bytes:
    """What came, and what was forecast of each moment some time before, with its intervals.

    *entry* has ``unit``, ``window_time_unix_s`` and ``window``, which came, and ``panels``: what
    was forecast as in ``forecast``, by how long before.
    """
    figure, panels = _figure(len(entry["panels"]), a_row=1, height=2.4)
    came_s = _floats(entry["window_time_unix_s"])
    for axes, (before, values) in zip(panels, entry["panels"].items(), strict=True):
        data = {name: _floats(each) for name, each in values.items()}
        data["window"] = _floats(entry["window"])
        said_days = _days(data["time_unix_s"])
        _intervals(axes, data)
        axes.plot(_days(came_s), data["window"], color=_CAME, linewidth=1.4, label="what came")
        axes.plot(said_days, data["yhat"], color=_FORECAST, linewidth=1.4, label="forecast")
        axes.set_title(f"{title}: forecast {before} before", loc="left", fontweight="bold")
        axes.set_ylabel(entry["unit"])
        _time_axis(axes)
        axes.margins(x=0.01)
        _limit(axes, data)
    for axes in panels[:-1]:
        axes.set_xlabel("")
    _legend(figure, panels[-1])
    return _png(figure)


def _intervals(axes: Axes, data: dict[str, NDArray[np.float64]]) -> None:
    for low, high, alpha, label in (
        ("lower_95", "upper_95", 0.15, "95 % interval"),
        ("lower_80", "upper_80", 0.30, "80 % interval"),
    ):
        axes.fill_between(
            _days(data["time_unix_s"]),
            data[low],
            data[high],
            color=_FORECAST,
            alpha=alpha,
            linewidth=0,
            label=label,
        )


def _legend(figure: Figure, axes: Axes) -> None:
    """Of what is in *axes*, in the order in which one reads it."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = ("window", "forecast", "80 % interval", "95 % interval", "what came")
    shown = [name for name in names if name in handles]
    figure.legend(
        [handles[name] for name in shown],
        shown,
        loc="outside lower center",
        ncols=5,
        frameon=False,
        columnspacing=1.2,
        handlelength=1.6,
    )


def loss(history: dict[str, Any], metrics: list[str]) -> bytes | None:
    """Training and validation loss a round, a panel a metric; None if there is no loss."""
    rounds = [entry for entry in history.get("rounds", []) if entry.get("metrics")]
    shown = [m for m in metrics if any(m in entry["metrics"] for entry in rounds)]
    if not shown:
        return None
    figure, panels = _figure(len(shown))
    for axes, metric in zip(panels, shown, strict=True):
        numbers = [entry["round"] for entry in rounds]
        values = [entry["metrics"].get(metric, {}) for entry in rounds]
        for key, label, colour, marker in (
            ("train_loss", "training", _PAST, "o"),
            ("eval_loss", "validation", _FORECAST, "s"),
        ):
            line = _floats([value.get(key) for value in values])
            axes.plot(
                numbers, line, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label
            )
        axes.set_title(metric, loc="left", fontweight="bold")
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[0].set_ylabel("loss")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return _png(figure)


def thin(
    times_s: NDArray[np.float64], values: NDArray[np.float64], points_max: int = POINTS_MAX
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most *points_max* of the points: of each stretch the lowest and the highest, in order."""
    if len(values) <= points_max:
        return times_s, values
    kept: list[int] = []
    for part in np.array_split(np.arange(len(values)), points_max // 2):
        inside = values[part]
        if np.isfinite(inside).any():
            ends = {int(np.nanargmin(inside)), int(np.nanargmax(inside))}
            kept += [int(part[0]) + i for i in sorted(ends)]
        else:
            kept.append(int(part[0]))
    return times_s[kept], values[kept]


def _figure(
    panels: int, a_row: int = PANELS_A_ROW, height: float = 3.4
) -> tuple[Figure, list[Axes]]:
    columns = min(panels, a_row)
    rows = math.ceil(panels / a_row)
    width = 6.8 if columns == 1 else 3.4 * columns
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)
    figure = Figure(figsize=(width, height * rows), dpi=140, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[panels:]:
        empty.set_visible(False)
    axes = axes[:panels]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color=_GRID, linewidth=0.7)
        panel.set_axisbelow(True)
    return figure, axes


def _limit(axes: Axes, data: dict[str, NDArray[np.float64]]) -> None:
    """Let a very wide 95 % interval leave the picture, so that the lines can still be seen."""
    names = ("window", "actual", "yhat", "lower_80", "upper_80")
    inner = np.concatenate([data[name] for name in names if name in data])
    if not np.isfinite(inner).any():
        return
    low, high = np.nanmin(inner), np.nanmax(inner)
    room = 0.4 * (high - low) or max(abs(high), 1.0) * 0.05
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - room), min(top, high + room))


def _time_axis(axes: Axes) -> None:
    locator = dates.AutoDateLocator(tz=UTC, minticks=4, maxticks=9)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    formatter = dates.ConciseDateFormatter(locator, tz=UTC)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_formatter(formatter)
    axes.set_xlabel("time (UTC)")


def _days(times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds since 1970 as matplotlib's days."""
    return times_s / 86_400.0


def _floats(values: list[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
