"""``icos-fl-server``: what a controller does beside its SuperLink."""

import argparse
import sys
import tomllib
from pathlib import Path

from icos_fl_server.checkpoints import load_run
from icos_fl_server.errors import ServerError
from icos_fl_server.quiesce import quiesce
from icos_fl_server.settings import RunConfig, parse


def main() -> None:
    """Exit with 0, or with one line on standard error and 1, or 2 for what cannot be used."""
    arguments = _parser().parse_args()
    if arguments.command == "check":
        _check(arguments.file)
    elif arguments.command == "enrolment":
        from icos_fl_server.enrolment.service import serve

        serve()
    elif arguments.command == "page":
        from icos_fl_server.page.service import serve as serve_page

        serve_page()
    elif arguments.command == "quiesce":
        _quiesce(arguments.folder, arguments.timeout)
    else:
        _node(arguments)


def _check(file: Path) -> None:
    try:
        config = parse(tomllib.loads(file.read_text(encoding="utf-8")))
        if config.resume:
            load_run(Path(config.resume), config.metric)
    except (ServerError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _quiesce(folder: Path, timeout_seconds: float) -> None:
    try:
        lines = quiesce(folder, timeout_seconds)
    except (ServerError, OSError) as error:
        sys.exit(f"icos-fl-server: {error}")
    print("\n".join(lines) or f"{folder}: no run is under way")


def _node(arguments: argparse.Namespace) -> None:
    from icos_fl_service.settings import load_or_exit
    from icos_fl_timeseries_store import InvalidRows

    from icos_fl_server.enrolment import commands
    from icos_fl_server.enrolment.refusals import Refused
    from icos_fl_server.enrolment.settings import EnrolmentSettings

    settings = load_or_exit(EnrolmentSettings)
    try:
        if arguments.what == "invite":
            commands.invite(settings, arguments.name, arguments.hours)
        elif arguments.what == "list":
            commands.show(settings, as_json=arguments.json)
        else:
            commands.remove(settings, arguments.name)
    except (ServerError, Refused, InvalidRows, OSError) as error:
        sys.exit(f"icos-fl-server: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="icos-fl-server", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="check a run configuration without running it")
    check.add_argument("file", type=Path, help="TOML, as flwr run --run-config takes it")
    commands.add_parser("enrolment", help="take in nodes that were invited, until SIGTERM")
    commands.add_parser("page", help="show runs and their nodes to people, until SIGTERM")
    end = commands.add_parser("quiesce", help="end the run with the round in hand, and wait for it")
    end.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=RunConfig.model_fields["result_dir"].default,
        help="result-dir of the run, or a folder of such (default: %(default)s)",
    )
    end.add_argument(
        "--timeout",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="how long to wait for the end of the round (default: %(default)g)",
    )
    whats = commands.add_parser("node", help="who may take part").add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )
    invite = whats.add_parser("invite", help="print an invitation, good for one key")
    invite.add_argument("name", metavar="NAME")
    invite.add_argument(
        "--hours", type=float, default=24.0, help="until it expires (default: %(default)g)"
    )
    show = whats.add_parser("list", help="nodes and invitations")
    show.add_argument("--json", action="store_true", help="print JSON on standard output")
    remove = whats.add_parser("remove", help="let a node in no more")
    remove.add_argument("name", metavar="NAME")
    return parser


if __name__ == "__main__":
    main()
