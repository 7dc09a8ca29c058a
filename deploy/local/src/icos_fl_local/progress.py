"""What happens, for people: a live view on a terminal, one line an event elsewhere."""

import contextlib
import sys
import time
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_ROWS_LINE_SECONDS = 5.0
_COLOURS = {"up": "green", "starting": "yellow", "stopping": "yellow", "stopped": "dim"}


class Progress:
    """Call its methods when something happens; use it as a context manager.

    On a terminal the view is drawn anew, and ``say`` prints above it. Safe to call from threads.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._plain = not self._console.is_terminal
        self._components: dict[str, str] = {}
        self._rows: dict[str, str] = {}
        self._rows_told: dict[str, float] = {}
        self._training = ""
        self._live: Live | None = None
        self._stage_start = time.monotonic()
        self.stages: list[dict[str, str | float]] = []

    def __enter__(self) -> "Progress":
        if not self._plain:
            self._live = Live(
                get_renderable=self._view,
                console=self._console,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """End the live view; lines are printed from now on."""
        if self._live:
            self._live.stop()
            self._live = None
        self._plain = True

    def say(self, line: str) -> None:
        """A line that stays; lost where the disk is full, which is no reason to end the work."""
        with contextlib.suppress(OSError):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def component(self, name: str, state: str) -> None:
        """*name* is now starting, up, stopping or stopped."""
        self._components[name] = state
        if self._plain and state in ("up", "stopped"):
            self.say(f"{name}: {state}")

    def rows(self, node: str, rows: int, of: int | None = None) -> None:
        """Rows in the window of *node*."""
        text = f"{rows:,} rows" if of is None else f"{rows:,} of {of:,} rows"
        if self._rows.get(node) == text:
            return
        self._rows[node] = text
        now = time.monotonic()
        told = self._rows_told.get(node)
        full = of is None or rows >= of
        if self._plain and (full or told is None or now > told + _ROWS_LINE_SECONDS):
            self._rows_told[node] = now
            self.say(f"window of {node}: {text}")

    def training(self, text: str) -> None:
        """Where the training is."""
        if text != self._training:
            self._training = text
            if self._plain:
                self.say(text)

    def stage(self, name: str, seconds_ago: float = 0.0) -> None:
        """The stage *name* ended *seconds_ago*; it began where the one before ended."""
        now = time.monotonic() - seconds_ago
        self.stages.append({"name": name, "seconds": round(now - self._stage_start, 1)})
        self._stage_start = now

    def timing(self) -> str:
        """The seconds of all stages in one line."""
        total = sum(float(stage["seconds"]) for stage in self.stages)
        parts = ", ".join(f"{stage['name']} {stage['seconds']} s" for stage in self.stages)
        return f"took {total:.1f} s: {parts}"

    def _view(self) -> Group:
        components = Text("  ")
        for name, state in list(self._components.items()):
            components.append(f"{name} {state}   ", style=_COLOURS.get(state, ""))
        windows = Table.grid(padding=(0, 2))
        for node, rows in list(self._rows.items()):
            windows.add_row(f"  window of {node}", rows)
        return Group(components, windows, Text(f"  {self._training}", style="bold"))


def to(json_wanted: bool) -> TextIO:
    """Progress goes to standard error when standard output is for JSON."""
    return sys.stderr if json_wanted else sys.stdout
