"""``icos-fl-store``: start the store's services, and look at what a store holds."""

import argparse
import sys

from icos_fl_timeseries_store.errors import StoreError
from icos_fl_timeseries_store.services import (
    SERVICES,
    ServiceSettings,
    StateFolderError,
    serve,
)
from icos_fl_timeseries_store.settings import load_or_exit


def main() -> None:
    """Parse the command line and run it."""
    arguments = _parser().parse_args()
    try:
        if arguments.command == "serve":
            serve(arguments.service, load_or_exit(ServiceSettings))
    except (StateFolderError, StoreError) as error:
        sys.exit(f"icos-fl-store: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="icos-fl-store", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="run one service in the foreground")
    serving.add_argument("service", choices=SERVICES)
    return parser


if __name__ == "__main__":
    main()
