"""What a backtest found, whatever the forecasts came from."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from icos_fl_client.forecasting import backtest
from icos_fl_client.forecasting.intervals import ERRORS_MIN
from icos_fl_client.serving.settings import duration_text
from numpy.typing import NDArray

from icos_fl_local.errors import UsageError

SHOWN_STEPS = 240
"""At 15 s a step an hour."""
RELIED_ON_80, RELIED_ON_95 = 0.6, 0.8
"""Below such a coverage the node's page warns too."""


@dataclass(frozen=True)
class Judged:
    """One metric of one node: what was said, and what it was worth."""

    node: str
    metric: str
    unit: str
    interval_seconds: float
    end_unix_s_t: NDArray[np.float64]
    """Of each step."""
    record: backtest.Record
    scores: list[backtest.StepScores]
    notes: tuple[str, ...] = ()
    """What a reader must know of it."""

    def horizon(self, step: int) -> str:
        """Such as ``5m``."""
        return duration_text(step * self.interval_seconds)

    def of_late(self) -> dict[str, Any]:
        """What came in the newest SHOWN_STEPS, or twice the longest horizon, and what was forecast.

        As ``plots.record`` draws it: t moments, NaN where nothing was said.
        """
        record, end_s_t = self.record, self.end_unix_s_t
        shown_steps = max(SHOWN_STEPS, 2 * int(record.steps_h[-1]))
        first_s = end_s_t[-1] - shown_steps * self.interval_seconds
        panels = {}
        for place, step in enumerate(record.steps_h.tolist()):
            time_s_t = end_s_t + step * self.interval_seconds
            shown_t = time_s_t > first_s
            low_95, low_80, high_80, high_95 = record.quantile_tqh[shown_t, :, place].T
            panels[self.horizon(step)] = {
                "time_unix_s": time_s_t[shown_t],
                "yhat": record.yhat_th[shown_t, place],
                "lower_80": low_80,
                "upper_80": high_80,
                "lower_95": low_95,
                "upper_95": high_95,
            }
        came_t = end_s_t > first_s
        came = {"window_time_unix_s": end_s_t[came_t], "window": record.values_t[came_t]}
        return {"unit": self.unit, "panels": panels, **came}

    def without_figures(self) -> list[str]:
        """Of which steps ahead there are none, and why."""
        steps = int(np.isfinite(self.record.values_t).sum())
        return [
            f"{self.node}, {self.metric}: nothing came {self.horizon(ahead)} after a forecast, "
            f"in {steps} steps with a value"
            for ahead in sorted({*self.record.steps_h.tolist()} - {s.step for s in self.scores})
        ]

    def doubts(self) -> list[str]:
        """Of which steps ahead there are no intervals, or none to rely on."""
        lines = []
        for each in self.scores:
            about = f"{self.node}, {self.metric}: {self.horizon(each.step)} ahead"
            held = {interval.percent: interval.coverage for interval in each.intervals}
            if not held:
                lines.append(
                    f"{about} no intervals: fewer than {ERRORS_MIN} forecasts had come to their end"
                )
            elif held["80"] < RELIED_ON_80 or held["95"] < RELIED_ON_95:
                of_80, of_95 = (f"{100 * held[percent]:.0f} %" for percent in ("80", "95"))
                lines.append(
                    f"{about} the intervals of 80 % and 95 % held {of_80} and {of_95}: "
                    "do not rely on them"
                )
        return lines

    def entries(self) -> Iterator[dict[str, Any]]:
        """As plain data, one a horizon."""
        for each in self.scores:
            yield {
                "node": self.node,
                "metric": self.metric,
                "unit": self.unit,
                "interval_seconds": self.interval_seconds,
                "horizon": self.horizon(each.step),
                "step": each.step,
                "forecasters": [asdict(score) for score in each.forecasters],
                "intervals": [asdict(interval) for interval in each.intervals],
            }


@dataclass(frozen=True)
class Found:
    """All of a backtest."""

    source: str
    judged: list[Judged]
    """Those that have figures."""
    notes: list[str]
    """What there is no figure of, with the reason; what a reader must know of the others."""

    def nothing(self) -> str:
        """Why there is no figure at all."""
        return f"{self.source}: no figures: {'; '.join(self.notes) or 'nothing is forecast'}"


def judge(
    about: tuple[str, str, str, float],
    end_unix_s_t: NDArray[np.float64],
    number_t: NDArray[np.int64],
    record: backtest.Record,
    notes: Sequence[str] = (),
) -> Judged:
    """Score *record*, *about* which are node, metric, unit and seconds of a step."""
    scores = backtest.score(record, backtest.baselines(record, number_t, about[3]))
    return Judged(*about, end_unix_s_t, record, scores, tuple(notes))


def gather(source: str, judged: Iterable[Judged], notes: list[str]) -> Found:
    """Keep what has figures."""
    kept = []
    for each in judged:
        notes += [*each.notes, *each.without_figures(), *each.doubts()]
        kept += [each] if each.scores else []
    return Found(source, kept, notes)


def known(what: str, asked: Sequence[str], there: Sequence[str]) -> Sequence[str]:
    """Those that are *asked* for, or all. Raises UsageError."""
    names = list(dict.fromkeys(there))
    for name in asked:
        if name not in names:
            raise UsageError(f"no {what} {name!r}; there are: {', '.join(names) or 'none'}")
    return asked or names
