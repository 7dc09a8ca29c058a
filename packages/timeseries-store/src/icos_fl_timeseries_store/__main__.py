"""``icos-fl-store``: start the store's services, and look at what a store holds."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from icos_fl_service.metrics import MetricsAddressError
from icos_fl_service.settings import load_or_exit
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from icos_fl_timeseries_store import connect
from icos_fl_timeseries_store.conditions import (
    Condition,
    ExpectationsError,
    exit_status,
    load_expectations,
)
from icos_fl_timeseries_store.contract import Store
from icos_fl_timeseries_store.errors import StoreDamaged, StoreError, StoreUnavailable, UnknownNode
from icos_fl_timeseries_store.services import SERVICES, ServiceSettings, StateFolderError, serve
from icos_fl_timeseries_store.settings import StoreSettings
from icos_fl_timeseries_store.watch import Report, Watcher, look, to_csv


def main() -> None:
    """Parse the command line and run it."""
    arguments = _parser().parse_args()
    settings = load_or_exit(ServiceSettings)
    try:
        if arguments.command == "serve":
            serve(arguments.service, settings)
            return
        address = StoreSettings(
            host=settings.metadata_host or settings.host, port=settings.metadata_port
        )
        with connect(address) as store:
            status = _COMMANDS[arguments.command](store, arguments)
    except ExpectationsError as error:
        print(f"icos-fl-store: {error}", file=sys.stderr)
        sys.exit(2)
    except (StateFolderError, StoreError, MetricsAddressError) as error:
        sys.exit(f"icos-fl-store: {error}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        sys.exit(status)


def _nodes(store: Store, _arguments: argparse.Namespace) -> int:
    for node in store.nodes():
        print(node)
    return 0


def _window(store: Store, arguments: argparse.Namespace) -> int:
    rows = store.window(arguments.node).read(last=arguments.last)
    if arguments.csv:
        sys.stdout.write(to_csv(rows))
    else:
        Console().print(_shown(look(arguments.node, rows)))
    return 0


def _watch(store: Store, arguments: argparse.Namespace) -> int:
    expectations = load_expectations(arguments.expectations)
    watcher = Watcher(store, arguments.node, expectations, recorded=arguments.recorded)
    if arguments.once:
        reports = watcher.look()
        _tell(reports, as_json=arguments.json)
        if not reports:
            print("icos-fl-store: no node has a window", file=sys.stderr)
            return Condition.SILENT.value
        return exit_status([found for report in reports for found in report.conditions])
    with _live(arguments) as show:
        while True:
            try:
                show(watcher.look(), "")
                watcher.wait(arguments.interval)
            except StoreUnavailable as error:  # it may come back, and a watch of months is there
                show([], str(error))
                time.sleep(arguments.interval)


@contextlib.contextmanager
def _live(arguments: argparse.Namespace) -> Iterator[Callable[[list[Report], str], None]]:
    """Yields what shows the reports of one look, or the problem that there is none."""
    console = Console()
    if arguments.json or not console.is_terminal:

        def lines(reports: list[Report], problem: str) -> None:
            _tell(reports, as_json=arguments.json)
            if problem:
                print(json.dumps({"problem": problem}) if arguments.json else problem, flush=True)

        yield lines
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:

        def redraw(reports: list[Report], problem: str) -> None:
            at = time.strftime("%H:%M:%S")
            shown = [Text(f"{at}  {problem}", "bold red")] if problem else [Text(at)]
            live.update(Group(*shown, *map(_shown, reports)), refresh=True)

        yield redraw


def _tell(reports: list[Report], *, as_json: bool) -> None:
    for report in reports:
        if as_json:
            print(json.dumps(report.as_dict()), flush=True)
        else:
            Console().print(_shown(report))


def _check(store: Store, _arguments: argparse.Namespace) -> int:
    damaged = 0
    for node in store.nodes():
        try:
            print(f"{node}: {store.window(node).info().rows} rows")
        except StoreDamaged as error:
            damaged += 1
            print(f"{node}: damaged: {error}")
        except UnknownNode:
            continue  # it was never made: its writer found the disk full
    return 1 if damaged else 0


def _repair(store: Store, arguments: argparse.Namespace) -> int:
    from icos_fl_timeseries_store.dataclay_store import DataClayStore

    assert isinstance(store, DataClayStore)
    print(f"{arguments.node}: {store.repair(arguments.node)}")
    return 0


_COMMANDS = {
    "nodes": _nodes,
    "window": _window,
    "watch": _watch,
    "check": _check,
    "repair": _repair,
}


def _shown(report: Report) -> RenderableType:
    facts = [f"{report.rows} rows", f"{report.added} added", f"{report.removed} removed"]
    if report.interval_seconds is not None:
        gaps = "1 gap" if report.gaps == 1 else f"{report.gaps} gaps"
        facts += [f"every {report.interval_seconds:g} s", gaps]
    title = Text(f"{report.node}: {', '.join(facts)}", "bold")
    wrong = [
        Text(
            f"{' '.join(filter(None, [found.column, found.condition.word]))}: {found.reason}",
            "bold red",
        )
        for found in report.conditions
    ]
    return Group(title, *([_statistics(report)] if report.columns else []), *wrong)


def _statistics(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("column", "unit", "values", "NaN", "min", "mean", "max", "last"):
        table.add_column(name, justify="left" if name in ("column", "unit") else "right")
    for name, column in report.columns.items():
        numbers = (column.minimum, column.mean, column.maximum, column.last)
        table.add_row(
            name,
            column.unit,
            str(column.values),
            str(column.nans),
            *("-" if number is None else f"{number:.6g}" for number in numbers),
        )
    return table


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} s; it must be 0.1 to 86400")
    return seconds


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} rows; it must be 1 or more")
    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="icos-fl-store", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="run one service in the foreground")
    serving.add_argument("service", choices=SERVICES)
    commands.add_parser("nodes", help="the nodes that have a window")
    commands.add_parser("check", help="is any window damaged? ends with 1 if so")
    repair = commands.add_parser("repair", help="keep what is intact of a damaged window")
    repair.add_argument("node")
    window = commands.add_parser("window", help="the rows of a node's window")
    window.add_argument("node")
    window.add_argument("--csv", action="store_true", help="the rows, not their statistics")
    window.add_argument("--last", type=_count, help="the newest LAST rows only")
    watch = commands.add_parser("watch", help="what comes in and what is wrong, again and again")
    watch.add_argument("node", nargs="?", help="one node; all of them without it")
    watch.add_argument("--json", action="store_true", help="one JSON object a line")
    watch.add_argument(
        "--once", action="store_true", help="look once; the exit status says what is wrong"
    )
    watch.add_argument(
        "--recorded", action="store_true", help="do not compare the rows' times with the clock"
    )
    watch.add_argument(
        "--expectations", type=Path, metavar="FILE", help="thresholds, and ranges of columns (TOML)"
    )
    watch.add_argument(
        "--interval",
        type=_seconds,
        default=5.0,
        help="seconds between looks",
    )
    return parser


if __name__ == "__main__":
    main()
