"""``icos-fl-store``: start the store's services, and look at what a store holds."""

import argparse
import json
import os
import sys
import time

from rich.console import Console
from rich.table import Table

from icos_fl_timeseries_store import connect
from icos_fl_timeseries_store.contract import Rows, Store
from icos_fl_timeseries_store.errors import StoreError, UnknownNode
from icos_fl_timeseries_store.services import SERVICES, ServiceSettings, StateFolderError, serve
from icos_fl_timeseries_store.settings import StoreSettings, load_or_exit
from icos_fl_timeseries_store.watch import Report, look, to_csv


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
            _COMMANDS[arguments.command](store, arguments)
    except (StateFolderError, StoreError) as error:
        sys.exit(f"icos-fl-store: {error}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)


def _nodes(store: Store, _arguments: argparse.Namespace) -> None:
    for node in store.nodes():
        print(node)


def _window(store: Store, arguments: argparse.Namespace) -> None:
    rows = store.window(arguments.node).read(last=arguments.last)
    if arguments.csv:
        sys.stdout.write(to_csv(rows))
    else:
        _show(look(arguments.node, rows))


def _watch(store: Store, arguments: argparse.Namespace) -> None:
    before: dict[str, Rows] = {}
    while True:
        for node in [arguments.node] if arguments.node else store.nodes():
            try:
                rows = store.window(node).read()
            except UnknownNode:
                if arguments.node:
                    raise
                continue  # the name of a window that a killed backend lost, not yet made anew
            report = look(node, rows, before.get(node))
            before[node] = rows
            if arguments.json:
                print(json.dumps(report.as_dict()), flush=True)
            else:
                _show(report)
        if arguments.once:
            return
        if arguments.node:
            store.window(arguments.node).wait(before[arguments.node].cursor, arguments.interval)
        else:
            time.sleep(arguments.interval)


_COMMANDS = {"nodes": _nodes, "window": _window, "watch": _watch}


def _show(report: Report) -> None:
    facts = [f"{report.rows} rows", f"{report.added} added", f"{report.removed} removed"]
    if report.interval_seconds is not None:
        facts += [f"every {report.interval_seconds:g} s", f"{report.gaps} gaps"]
    table = Table(title=f"{report.node}: {', '.join(facts)}", title_justify="left")
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
    Console().print(table)


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
    window = commands.add_parser("window", help="the rows of a node's window")
    window.add_argument("node")
    window.add_argument("--csv", action="store_true", help="the rows, not their statistics")
    window.add_argument("--last", type=_count, help="the newest LAST rows only")
    watch = commands.add_parser("watch", help="rows, rate, gaps, NaNs and changes, again and again")
    watch.add_argument("node", nargs="?", help="one node; all of them without it")
    watch.add_argument("--json", action="store_true", help="one JSON object a line")
    watch.add_argument("--once", action="store_true", help="look once and end")
    watch.add_argument(
        "--interval",
        type=_seconds,
        default=5.0,
        help="seconds between looks",
    )
    return parser


if __name__ == "__main__":
    main()
