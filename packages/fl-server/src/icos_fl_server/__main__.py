"""``icos-fl-server check FILE``: is a run configuration one that the ServerApp takes?"""

import argparse
import sys
import tomllib
from pathlib import Path

from icos_fl_server.checkpoints import load_run
from icos_fl_server.errors import ServerError
from icos_fl_server.settings import parse


def main() -> None:
    """Exit with 0, or with 2 and one line on standard error."""
    parser = argparse.ArgumentParser(prog="icos-fl-server", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check a run configuration without running it")
    check.add_argument("file", type=Path, help="TOML, as flwr run --run-config takes it")
    file: Path = parser.parse_args().file
    try:
        config = parse(tomllib.loads(file.read_text(encoding="utf-8")))
        if config.resume:
            load_run(Path(config.resume), config.metric)
    except (ServerError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
