"""Rates of counters: change a second, from each point and the one before it in its series.

A rate is a function of the points of its series and not of how they arrive: in whichever order and
requests they come, and however often, each ends with the same rate. So a batch that is sent again
writes what is there already.
"""

import threading
from array import array
from bisect import bisect_left
from collections.abc import Hashable, Iterable
from enum import Enum, auto
from operator import itemgetter
from typing import Final

HISTORY_POINTS: Final = 512
"""Points of a series that are kept; what is older than them has no rate any more."""
SERIES_MAX: Final = 4096
"""Series that are kept; of more, those that were silent longest begin anew."""
GAP_NS_MAX: Final = 300 * 10**9
"""Of two points further apart, the later begins anew: its rate would be that of a gap."""

CounterPoint = tuple[int, int, float]
"""Time and start time in nanoseconds since 1970 (a start of 0 is unknown), and value."""


class Counting(Enum):
    """How a series counts."""

    DELTA = auto()
    CUMULATIVE = auto()
    CUMULATIVE_UP_AND_DOWN = auto()


class Rates:
    """The newest points of each series that a rate is asked of. Any thread may call."""

    def __init__(self, history_points: int = HISTORY_POINTS, series_max: int = SERIES_MAX) -> None:
        self._history_points = history_points
        self._series_max = series_max
        self._series: dict[Hashable, _Series] = {}
        self._lock = threading.Lock()

    def of(
        self, key: Hashable, counting: Counting, points: Iterable[CounterPoint]
    ) -> dict[int, float]:
        """Change a second by time, of those of *points* that have one, and of who follows them.

        A series that turns from delta to cumulative, or back, is another series.
        """
        with self._lock:
            series = self._series.pop((key, counting), None) or _Series(counting)
            self._series[key, counting] = series
            while len(self._series) > self._series_max:
                del self._series[next(iter(self._series))]
        with series.lock:  # many points of one hold up no other
            # In order of time, as each insertion before others would move them.
            ordered = sorted(points, key=itemgetter(0))
            times = [point[0] for point in ordered if series.put(*point)]
            rates = series.rates(times)
            series.trim(self._history_points)
            return rates


class _Series:
    """Points of one series in order of time."""

    def __init__(self, counting: Counting) -> None:
        self.lock = threading.Lock()
        self._counting = counting
        self._times = array("q")
        self._starts = array("Q")
        self._values = array("d")
        self._trimmed = False

    def put(self, time: int, start: int, value: float) -> bool:
        """Take the point, in place of one of its time; not if what was around it is forgotten."""
        place = bisect_left(self._times, time)
        if place < len(self._times) and self._times[place] == time:
            self._starts[place], self._values[place] = start, value
            return True
        if place == 0 and self._trimmed:
            return False
        self._times.insert(place, time)
        self._starts.insert(place, start)
        self._values.insert(place, value)
        return True

    def trim(self, points: int) -> None:
        surplus = len(self._times) - points
        if surplus > 0:
            self._trimmed = True
            for column in (self._times, self._starts, self._values):
                del column[:surplus]

    def rates(self, times: list[int]) -> dict[int, float]:
        """Rates at *times*, and at the point after each: a late one has changed what that is."""
        rates = {}
        for time in times:
            place = bisect_left(self._times, time)
            for near in range(place, min(place + 2, len(self._times))):
                rate = self._rate(near)
                if rate is not None:
                    rates[self._times[near]] = rate
        return rates

    def _rate(self, place: int) -> float | None:
        time, start, value = self._times[place], self._starts[place], self._values[place]
        if self._counting is Counting.DELTA and 0 < start < time:
            return value / ((time - start) / 1e9)
        if place == 0 or time - self._times[place - 1] > GAP_NS_MAX:
            return None
        change = value if self._counting is Counting.DELTA else self._change(place)
        return None if change is None else change / ((time - self._times[place - 1]) / 1e9)

    def _change(self, place: int) -> float | None:
        """By how much a cumulative series changed since the point before.

        A counter that began after that point began at 0. One that begins at its own first point has
        a beginning that nobody knows, and so has no change yet.
        """
        time, start, value = self._times[place], self._starts[place], self._values[place]
        before, start_before = self._times[place - 1], self._starts[place - 1]
        up_only = self._counting is Counting.CUMULATIVE
        if start == time:
            return None
        if start not in (0, start_before) and start >= before:
            return value if up_only else None
        change = value - self._values[place - 1]
        return value if up_only and change < 0 else change
