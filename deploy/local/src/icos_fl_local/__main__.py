"""``icos-fl``: deployments of ICOS-FL.

What needs more than the base install is imported by the command that needs it.
"""

import argparse
import contextlib
import difflib
import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from icos_fl_local.errors import Interrupted, LocalError, UsageError
from icos_fl_local.state import DEFAULT, StateFolder

_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


class _Parser(argparse.ArgumentParser):
    """Refuses what it does not know with its own usage, and the options that were perhaps meant."""

    def parse_known_args(self, *args: Any, **keywords: Any) -> Any:
        found, unknown = super().parse_known_args(*args, **keywords)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], options)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown


def main() -> None:
    """Run the command line; exits with its status."""
    arguments = _parser().parse_args()
    if arguments.command in _LIGHT:
        status = _finish(_LIGHT[arguments.command], arguments)
    elif importlib.util.find_spec(_LOCAL) is None:
        print(
            f"icos-fl: {arguments.command} is about services on this machine, and they are not "
            "installed: pip install 'icos-fl[local]'",
            file=sys.stderr,
        )
        status = 1
    else:
        status = _run_local(arguments)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(status)


def _run_local(arguments: argparse.Namespace) -> int:
    """A command about a deployment on this machine."""
    from icos_fl_local import guard

    if arguments.command == "up":
        # Forks, so before anything that starts a thread.
        return guard.run_guarded(lambda: _finish(_up, arguments), keep=arguments.keep)
    if arguments.command == "train":
        return guard.run_guarded(lambda: _finish(_train, arguments))
    if arguments.command == "simulate":
        return _finish(_guarded_simulate, arguments)
    return _finish(_COMMANDS[arguments.command], arguments)


def _finish(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Turn what can go wrong into one clear line and an exit status."""
    _raise_on_signals()
    try:
        return command(arguments)
    except Interrupted as interrupted:
        if arguments.command in _STOPPED:
            print(f"interrupted ({interrupted}); {_STOPPED[arguments.command]}", file=sys.stderr)
        return interrupted.exit_status
    except LocalError as error:
        print(f"icos-fl: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # such as: icos-fl logs | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"icos-fl: {where}{error.strerror or error} (uid {os.getuid()})", file=sys.stderr)
        return 1


def _raise_on_signals() -> None:
    """The first signal ends what is going on; later ones do not disturb the ending."""

    def interrupt(number: int, _frame: object) -> None:
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def _up(arguments: argparse.Namespace) -> int:
    from icos_fl_local.replay import ReplayError
    from icos_fl_local.traces import TraceError
    from icos_fl_local.up import Options, up

    options = Options(
        state_folder=arguments.state_dir,
        out=arguments.out,
        source=arguments.source,
        traces=arguments.traces,
        nodes=arguments.nodes,
        rounds=arguments.rounds,
        metrics=tuple(arguments.metric),
        overrides=tuple(arguments.config),
        ports=tuple(arguments.port),
        bridge_config=arguments.bridge_config,
        json=arguments.json,
        keep=arguments.keep,
        runtime=arguments.runtime,
    )
    try:
        return up(options)
    except TraceError as error:
        raise UsageError(str(error)) from None
    except ReplayError as error:
        raise LocalError(str(error)) from None


def _doctor(arguments: argparse.Namespace) -> int:
    from icos_fl_local import doctor
    from icos_fl_local.deployment import parse_ports

    checks = doctor.examine(arguments.state_dir, parse_ports(arguments.port))
    if arguments.json:
        print(json.dumps([check.as_json() for check in checks]))
    else:
        print("\n".join(check.line() for check in checks))
    return 0 if all(check.ok for check in checks) else 1


def _status(arguments: argparse.Namespace) -> int:
    from icos_fl_local import status

    if arguments.address:
        return status.of_addresses(arguments.address, as_json=arguments.json)
    return status.of_deployment(StateFolder(arguments.state_dir), as_json=arguments.json)


def _watch(arguments: argparse.Namespace) -> int:
    from icos_fl_local import commands

    given = [f"--{name}" for name in ("json", "once") if getattr(arguments, name)]
    if arguments.expectations:
        given += ["--expectations", str(arguments.expectations)]
    return commands.watch(
        StateFolder(arguments.state_dir), [*given, *filter(None, [arguments.node])]
    )


def _window(arguments: argparse.Namespace) -> int:
    from icos_fl_local import commands

    csv = ["--csv"] if arguments.csv else []
    return commands.store_command(
        StateFolder(arguments.state_dir), ["window", arguments.node, *csv]
    )


def _train(arguments: argparse.Namespace) -> int:
    from icos_fl_local import commands

    return commands.train(
        StateFolder(arguments.state_dir),
        arguments.config,
        arguments.rounds,
        arguments.out,
        as_json=arguments.json,
    )


def _forecast(arguments: argparse.Namespace) -> int:
    from icos_fl_local import commands

    state = StateFolder(arguments.state_dir)
    return commands.forecast(state, arguments.node, as_json=arguments.json)


def _backtest(arguments: argparse.Namespace) -> int:
    from icos_fl_local.backtest import command

    output = command.Output(arguments.json, arguments.csv, arguments.html)
    nodes, metrics = arguments.node, arguments.metric
    if arguments.traces is None:
        for name in ("horizon", "interval", "model"):
            if getattr(arguments, name):
                raise UsageError(f"--{name} is for --traces: a forecaster has its own")
        state = StateFolder(arguments.state_dir)
        address = arguments.forecaster or command.address_in(state)
        files = {name: getattr(arguments, f"forecaster_{name}") for name in _FORECASTER_FILES}
        return command.ask(address, files, nodes, metrics, output)
    return command.replay(
        arguments.traces,
        command.Replayed(
            nodes=nodes,
            metrics=metrics,
            horizons=arguments.horizon or command.HORIZONS,
            interval_seconds=arguments.interval,
            model=arguments.model,
        ),
        output,
    )


def _logs(arguments: argparse.Namespace) -> int:
    from icos_fl_local import commands

    state = StateFolder(arguments.state_dir)
    return commands.logs(state, arguments.component, follow=arguments.follow)


def _quiesce(arguments: argparse.Namespace) -> int:
    from icos_fl_local import commands

    return commands.quiesce(StateFolder(arguments.state_dir), arguments.timeout)


def _down(arguments: argparse.Namespace) -> int:
    from icos_fl_local import commands

    return commands.down(StateFolder(arguments.state_dir))


def _certs(arguments: argparse.Namespace) -> int:
    from icos_fl_local import certs

    folder, what = arguments.folder, arguments.what
    if what == "show":
        return certs.show(folder, as_json=arguments.json)
    days, uid = arguments.days, arguments.uid
    if what == "renew":
        lines = certs.renew(folder, days, uid, also_good=arguments.all)
    else:
        lines = certs.make(folder, what, arguments.name, arguments.client, days, uid)
    print("\n".join(lines) or f"{folder}: no certificate but the authority's")
    return 0


def _node(arguments: argparse.Namespace) -> int:
    if arguments.what != "join":
        _become_server(sys.argv[1:])
    from icos_fl_local import joining

    word = sys.stdin.read() if arguments.invitation == "-" else arguments.invitation
    print("\n".join(joining.join(word, arguments.folder, arguments.uid)))
    return 0


def _become_server(arguments: list[str]) -> NoReturn:
    """Hand over to ``icos-fl-server``, which has the same command."""
    if importlib.util.find_spec(_SERVER) is None:
        raise LocalError(
            f"{' '.join(arguments[:2])} is for the controller, whose part is not installed: "
            "pip install 'icos-fl[controller]'"
        )
    command = [sys.executable, "-m", _SERVER, *arguments]
    os.execv(command[0], command)  # noqa: S606 - our own command


def _guarded_simulate(arguments: argparse.Namespace) -> int:
    """The guard removes what Ray kept, even if the launcher was killed.

    Below /tmp whatever TMPDIR is: Ray's sockets are there, whose paths may have 107 bytes.
    """
    from icos_fl_local import guard

    with tempfile.TemporaryDirectory(
        prefix="icos-fl-ray-",
        dir="/tmp",
        ignore_cleanup_errors=True,
    ) as scratch:
        arguments.scratch = Path(scratch)
        return guard.run_guarded(lambda: _finish(_simulate, arguments))


def _simulate(arguments: argparse.Namespace) -> int:
    from icos_fl_local.simulation.command import simulate
    from icos_fl_local.traces import TraceError
    from icos_fl_local.up import Options

    options = Options(
        state_folder=arguments.state_dir,
        out=arguments.out,
        traces=arguments.traces,
        nodes=arguments.nodes,
        rounds=arguments.rounds,
        metrics=tuple(arguments.metric),
        overrides=tuple(arguments.config),
    )
    sweeps, seeds, scratch = arguments.sweep, arguments.seeds, arguments.scratch
    try:
        return simulate(options, sweeps, seeds, scratch, as_json=arguments.json)
    except TraceError as error:
        raise UsageError(str(error)) from None


SHIPPED = Path(__file__).parent / "traces"
"""As icos_fl_local.traces has it, which the base install cannot import."""

_STOPPED = {
    "up": "everything is stopped",
    "train": "the run is stopped",
    "simulate": "everything is stopped",
}

_SIMULATE = """\
The same ServerApp and ClientApp as in a deployment, on Flower's simulation runtime: many virtual
nodes over recorded traces. One setting gives seconds a round, peak memory, loss a round, and the
error of each metric against that of the last value; a sweep gives a table with a row a setting,
best first. --out gets results.csv and results.json."""

_LOCAL = "icos_fl_timeseries_store"
"""Comes with the extra ``local``, as all other services do."""

_SERVER = "icos_fl_server"

_FORECASTER_FILES = {
    "ca": "who signed the forecaster's certificate; with it there is TLS",
    "certificate": "the certificate that the forecaster is shown",
    "key": "its key",
    "token": "a bearer token",
}

_LIGHT: dict[str, Callable[[argparse.Namespace], int]] = {
    "certs": _certs,
    "node": _node,
    "status": _status,
}
"""What the base install can do."""

_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "doctor": _doctor,
    "watch": _watch,
    "window": _window,
    "forecast": _forecast,
    "backtest": _backtest,
    "logs": _logs,
    "quiesce": _quiesce,
    "down": _down,
}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="icos-fl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--state-dir", type=Path, default=DEFAULT, metavar="DIR",
            help="folder for all state (default: %(default)s)",
        )  # fmt: skip
        return command

    def add_json(command: argparse.ArgumentParser) -> None:
        command.add_argument("--json", action="store_true", help="print JSON on standard output")

    def add_run(command: argparse.ArgumentParser, out: str = "icos-fl-report") -> None:
        command.add_argument(
            "--rounds", type=int, metavar="N", help="federated rounds (default: 5)"
        )
        command.add_argument(
            "-c", "--config", action="append", default=[], metavar="KEY=VALUE",
            help="run configuration of the Flower app; may be given again",
        )  # fmt: skip
        command.add_argument(
            "--out", type=Path, default=Path(out), metavar="DIR",
            help="folder for what comes out (default: %(default)s)",
        )  # fmt: skip
        add_json(command)

    def add_metric(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--metric", action="append", default=[], metavar="METRIC",
            help="column to learn; may be given again (default: power, CPU and memory where there)",
        )  # fmt: skip

    def add_ports(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--port", action="append", default=[], metavar="NAME=PORT",
            help="port of a component, such as bridge=4317, or of its /metrics, such as "
            "metrics-bridge=9465; free ones are found for the others",
        )  # fmt: skip

    up = add("up", "start everything, train, forecast, report, and stop everything")
    up.add_argument(
        "--source", choices=["replay", "host", "collector"], default="replay",
        help="recorded traces, or this machine as it is now, measured by the launcher or by "
        "Scaphandre and a Collector (default: %(default)s)",
    )  # fmt: skip
    up.add_argument("--traces", type=Path, metavar="DIR", help="folder of CSV traces to replay")
    up.add_argument(
        "--nodes", type=int, metavar="N", help="nodes (default: 4; 1 unless traces are replayed)"
    )
    add_metric(up)
    up.add_argument(
        "--bridge-config", type=Path, metavar="FILE",
        help="more of the bridge's configuration (YAML), such as more_columns",
    )  # fmt: skip
    up.add_argument("--keep", action="store_true", help="leave everything running at the end")
    up.add_argument(
        "--runtime", choices=["warm", "stock"], default="warm",
        help="Flower with warm tasks, or as it comes (default: %(default)s)",
    )  # fmt: skip
    add_run(up)
    add_ports(up)
    simulate = add(
        "simulate", "many virtual nodes over recorded traces: to tune, and what it costs"
    )
    simulate.description = _SIMULATE
    simulate.add_argument("--traces", type=Path, metavar="DIR", help="folder of CSV traces")
    simulate.add_argument(
        "--nodes", type=int, metavar="N",
        help="virtual nodes (default: one a trace, 4 at most); with more nodes than traces, node i "
        "takes half of trace i mod n, from a row of its own where the trace is long enough",
    )  # fmt: skip
    simulate.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=VALUE,VALUE,…",
        help="try these values of a key of the run configuration; given again, each value of one "
        "key with each of the others",
    )  # fmt: skip
    simulate.add_argument(
        "--seeds", type=int, default=1, metavar="K",
        help="run each setting K times, with seeds from -c seed=… on (default: %(default)s)",
    )  # fmt: skip
    add_metric(simulate)
    add_run(simulate, "icos-fl-simulation")
    doctor_command = add("doctor", "look whether this machine is fit for a deployment")
    add_json(doctor_command)
    add_ports(doctor_command)
    status = add(
        "status",
        "what runs, and how it is: exit status 0 healthy, 1 not, 3 not running, "
        "9 to 16 something is wrong with a window",
    )
    status.add_argument(
        "address", nargs="*", metavar="HOST:PORT",
        help="where a part serves its metrics: of these parts, in place of a local deployment",
    )  # fmt: skip
    add_json(status)
    watch = add("watch", "what comes into the windows, and what is wrong with them")
    watch.add_argument("node", nargs="?", metavar="NODE")
    watch.add_argument("--json", action="store_true", help="one JSON object a line")
    watch.add_argument(
        "--once", action="store_true", help="look once; the exit status says what is wrong"
    )
    watch.add_argument(
        "--expectations", type=Path, metavar="FILE", help="thresholds, and ranges of columns (TOML)"
    )
    window = add("window", "the rows that the store holds of a node")
    window.add_argument("node", metavar="NODE")
    window.add_argument("--csv", action="store_true", help="as CSV: time_unix_s, then the columns")
    add_run(add("train", "another federated run on the windows as they are now"))
    forecast = add("forecast", "what comes next, as the nodes' forecaster says it")
    forecast.add_argument("node", nargs="?", metavar="NODE")
    add_json(forecast)
    _add_backtest(add, add_json)
    logs = add("logs", "a component's log, or the end of all")
    logs.add_argument("component", nargs="?", metavar="COMPONENT")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as lines come")
    quiesce = add(
        "quiesce", "end the run with the round in hand, and begin no other until 'icos-fl train'"
    )
    quiesce.add_argument(
        "--timeout", type=float, default=900.0, metavar="SECONDS",
        help="how long to wait for the end of the round (default: %(default)g)",
    )  # fmt: skip
    add("down", "stop everything")
    _add_certs(commands)
    _add_node(commands)
    return parser


def _add_backtest(
    add: Callable[[str, str], argparse.ArgumentParser],
    add_json: Callable[[argparse.ArgumentParser], None],
) -> None:
    command = add("backtest", "what forecasts were worth, on recorded traces or on a running node")
    sources = command.add_mutually_exclusive_group()
    sources.add_argument(
        "--traces", type=Path, nargs="?", const=SHIPPED, metavar="DIR",
        help="replay the CSV traces in this folder (without DIR: those that ship)",
    )  # fmt: skip
    sources.add_argument(
        "--forecaster", metavar="HOST:PORT",
        help="ask this forecaster what it has said (default: that of the local deployment)",
    )  # fmt: skip
    for name, what in _FORECASTER_FILES.items():
        command.add_argument(f"--forecaster-{name}", type=Path, metavar="FILE", help=what)
    command.add_argument(
        "--horizon", action="append", metavar="LENGTH",
        help="how far ahead, such as 90s, 5m or 1h; may be given again (default: 1m, 5m, 1h)",
    )  # fmt: skip
    command.add_argument(
        "--interval", type=_integer(1, 86_400), metavar="SECONDS",
        help="length of a step (default: 15, or the distance of a trace's rows if that is more)",
    )  # fmt: skip
    command.add_argument(
        "--model", type=Path, metavar="FILE",
        help="a checkpoint of the server, as one more forecaster",
    )  # fmt: skip
    for name in ("node", "metric"):
        command.add_argument(
            f"--{name}", action="append", default=[], metavar=name.upper(),
            help=f"this {name} alone; may be given again",
        )  # fmt: skip
    add_json(command)
    command.add_argument("--csv", type=Path, metavar="FILE", help="write every forecast there")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots there")


def _integer(least: int, most: int) -> Callable[[str], int]:
    """An argument's type."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text}: a whole number from {least} to {most}")
        return number

    return parse


def _add_uid(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument(
        "--uid", type=_integer(0, 2**32 - 2), default=-1, metavar="UID",
        help=f"{text}, such as 10001 for our images (default: who runs this)",
    )  # fmt: skip


def _add_node(commands: _Commands) -> None:
    text = "invite machines to a federation, join one, see and remove its nodes"
    whats = commands.add_parser("node", help=text, description=text).add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return whats.add_parser(name, help=text, description=text)

    invite = add("invite", "at the controller: print an invitation, good for one key")
    invite.add_argument("name", metavar="NAME", help="of the node")
    invite.add_argument(
        "--hours", type=float, default=24.0, help="until it expires (default: %(default)g)"
    )
    join = add("join", "at the node: make its key, and have the controller register it")
    join.add_argument("invitation", metavar="INVITATION", help="- reads it from standard input")
    join.add_argument(
        "--folder", type=Path, default=Path("node"), metavar="DIR",
        help="where the key and the settings are put (default: %(default)s)",
    )  # fmt: skip
    _add_uid(join, "owner of these files")
    show = add("list", "at the controller: nodes and invitations")
    show.add_argument("--json", action="store_true", help="print JSON on standard output")
    remove = add("remove", "at the controller: let a node in no more, at once")
    remove.add_argument("name", metavar="NAME", help="of the node")


def _add_certs(commands: _Commands) -> None:
    text = "a certificate authority in a folder, and the certificates that it signs"
    whats = commands.add_parser("certs", help=text, description=text).add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )

    def add(name: str, text: str) -> argparse.ArgumentParser:
        what = whats.add_parser(name, help=text, description=text)
        what.add_argument(
            "--folder", type=Path, default=Path("certs"), metavar="DIR",
            help="where they are (default: %(default)s)",
        )  # fmt: skip
        return what

    def add_making(name: str, text: str) -> argparse.ArgumentParser:
        what = add(name, text)
        what.add_argument(
            "--days", type=_integer(1, 3650), default=365, metavar="N",
            help="how long a certificate is good for, 1 to 3650, and no longer than its authority "
            "(default: %(default)s)",
        )  # fmt: skip
        _add_uid(what, "owner of all but the authority's files")
        return what

    for deployment in ("controller", "node"):
        make = add_making(deployment, f"make what a {deployment} needs, and renew what is due")
        make.add_argument(
            "--name", action="append", default=[], metavar="NAME",
            help="DNS name or IP address by which other machines reach this one; may be given "
            "again (default: the names that the certificates have)",
        )  # fmt: skip
        make.add_argument(
            "--client", action="append", default=[], metavar="CLIENT",
            help="another client that gets a certificate; may be given again",
        )  # fmt: skip
    renew = add_making("renew", "renew what is in the last third of its time, for the same names")
    renew.add_argument("--all", action="store_true", help="renew all of them now")
    show = add("show", "names and expiry; exit status 1 if one is due or of no use")
    show.add_argument("--json", action="store_true", help="print JSON on standard output")


if __name__ == "__main__":
    main()
