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
    for low, high, alpha, label in (
        ("lower_95", "upper_95", 0.15, "95 % interval"),
        ("lower_80", "upper_80", 0.30, "80 % interval"),
    ):
        axes.fill_between(
            _days(ahead_s),
            data[low],
            data[high],
            color=_FORECAST,
            alpha=alpha,
            linewidth=0,
            label=label,
        )
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
    handles, labels = axes.get_legend_handles_labels()
    order = [
        labels.index(name)
        for name in ("window", "forecast", "80 % interval", "95 % interval", "what came")
    ]
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=5,
        frameon=False,
        columnspacing=1.2,
        handlelength=1.6,
    )
    return _png(figure)


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


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    columns = min(panels, PANELS_A_ROW)
    rows = math.ceil(panels / PANELS_A_ROW)
    width = 6.8 if panels == 1 else 3.4 * columns
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)
    figure = Figure(figsize=(width, 3.4 * rows), dpi=140, layout=layout, facecolor="white")
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
    inner = np.concatenate([data[name] for name in names])
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
