"""``icos-fl backtest``, from its options to what it prints and writes."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from icos_fl_client.credentials import Credentials
from icos_fl_client.errors import ConfigError
from rich.console import Console

from icos_fl_local.backtest.found import Found
from icos_fl_local.backtest.recorded import HORIZONS, Replayed, of_traces
from icos_fl_local.backtest.running import ForecasterClient, of_node
from icos_fl_local.deployment import FORECASTER, HOST
from icos_fl_local.errors import LocalError, UsageError
from icos_fl_local.state import StateFolder
from icos_fl_local.traces import TraceError

__all__ = ["HORIZONS", "Output", "Replayed", "address_in", "ask", "replay"]

WIDTH = 140
"""Of the tables where no terminal is."""


@dataclass(frozen=True)
class Output:
    """What is made of the figures; without ``json`` tables are printed."""

    json: bool
    csv: Path | None
    html: Path | None

    def check(self) -> None:
        """Before the work begins: raises UsageError for a file that cannot be written after it."""
        for file in filter(None, (self.csv, self.html)):
            if file.is_dir() or not file.absolute().parent.is_dir():
                raise UsageError(
                    f"{file} cannot be written: a folder has that name, or none is there"
                )

    def tell(self, found: Found) -> int:
        """Returns the exit status."""
        # Matplotlib takes a second, which no refusal should wait for.
        from icos_fl_local.backtest import report

        if self.csv:
            report.write_csv(self.csv, found)
        if self.html:
            report.write_page(self.html, found)
        if self.json:
            print(json.dumps(report.as_json(found), allow_nan=False))
        else:
            console = Console(file=sys.stdout)
            report.show(found, console if console.is_terminal else Console(width=WIDTH))
        return 0


def replay(folder: Path, options: Replayed, output: Output) -> int:
    """Of recorded traces. Raises LocalError."""
    output.check()
    try:
        found = of_traces(folder, options)
    except TraceError as error:
        raise UsageError(str(error)) from None
    if not found.judged:
        raise UsageError(found.nothing())
    return output.tell(found)


def ask(
    address: str,
    files: Mapping[str, Path | None],
    nodes: Sequence[str],
    metrics: Sequence[str],
    output: Output,
) -> int:
    """Of what a forecaster has said, by the *files* of ``Credentials``. Raises LocalError."""
    output.check()
    try:
        credentials = Credentials(**files, whose="forecaster")
        with ForecasterClient(address, credentials) as client:
            found = of_node(client, nodes, metrics)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    if not found.judged:
        raise LocalError(found.nothing())
    return output.tell(found)


def address_in(state: StateFolder) -> str:
    """Of the forecaster of the deployment that runs there. Raises LocalError."""
    components = state.read_running()["components"]
    if FORECASTER not in components:
        raise LocalError(
            f"{state.folder}: the deployment has no {FORECASTER}; "
            "give --forecaster HOST:PORT, or --traces DIR"
        )
    return f"{HOST}:{components[FORECASTER]['port']}"
