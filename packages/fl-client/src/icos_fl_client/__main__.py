"""``icos-fl-client``: forecast and backtest with the kept models; check a run configuration."""

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from icos_fl_timeseries_store import Store, StoreError, connect

from icos_fl_client.credentials import Credentials
from icos_fl_client.errors import ClientError
from icos_fl_client.processor_client import ProcessorClient
from icos_fl_client.settings import RunConfig, address, parse, store_settings

_FILES = {
    "ca": "who signed the processor's certificate; with it there is TLS",
    "certificate": "the certificate that the processor is shown",
    "key": "its key",
    "token": "a bearer token",
}


def main() -> None:
    """Parse the command line, print the answer; exit 1 if there is none for any node and metric."""
    arguments = _parser().parse_args()
    if arguments.command == "check":
        _check(arguments.file)
        return
    try:
        answer = _answer(arguments)
    except (ClientError, StoreError) as error:
        sys.exit(f"icos-fl-client: {error}")
    if arguments.json:
        print(json.dumps(answer, allow_nan=False))
    else:
        for line in _lines(answer):
            print(line)
    given = answer.get("forecasts", answer.get("results"))
    if not given:
        reasons = [item["reason"] for item in answer["unavailable"]]
        for reason in dict.fromkeys(reasons) or ["no node keeps a model yet"]:
            print(f"icos-fl-client: {reason}", file=sys.stderr)
        sys.exit(1)


def _check(file: Path) -> None:
    """Exit with 2 and one line for a run configuration that the ClientApp does not take.

    A model of one's own is built as it would be, so torch is loaded for it.
    """
    try:
        run = parse(RunConfig, tomllib.loads(file.read_text(encoding="utf-8")), "run config")
        if run.model != RunConfig.model_fields["model"].default:
            _check_model(run)
    except (ClientError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _check_model(run: RunConfig) -> None:
    from icos_fl_client.models import ModelError
    from icos_fl_client.node import build_model

    try:
        build_model(run, run.metric[0])
    except ModelError as error:
        raise ClientError(str(error)) from None


def _answer(arguments: argparse.Namespace) -> dict[str, Any]:
    from icos_fl_client.judge import Judge  # torch: --help does not wait for it

    with (
        connect(store_settings(arguments.store)) as store,
        ProcessorClient(
            arguments.processor, wait_for_ready=False, credentials=_credentials(arguments)
        ) as processor,
    ):
        nodes = list(dict.fromkeys(arguments.node or processor.nodes()))
        metrics = list(dict.fromkeys(arguments.metric or _columns(store, nodes)))
        judge = Judge(store, processor)
        if arguments.command == "forecast":
            return judge.forecast(nodes, metrics)
        return judge.backtest(nodes, metrics)


def _credentials(arguments: argparse.Namespace) -> Credentials:
    return Credentials(**{name: getattr(arguments, f"processor_{name}") for name in _FILES})


def _columns(store: Store, nodes: list[str]) -> list[str]:
    """Columns of the nodes' windows for which any of them keeps a model.

    Raises UnknownNode if there is no window of any of them.
    """
    there = sorted(set(nodes) & set(store.nodes())) or nodes
    columns = {column for node in there for column in store.window(node).info().columns}
    return sorted(
        column
        for column in columns
        if any(store.model_state(node, column).get() is not None for node in there)
    )


def _lines(answer: dict[str, Any]) -> list[str]:
    lines = []
    for item in answer.get("forecasts", []):
        last = item["yhat"][-1]
        seconds = item["interval_seconds"] * len(item["yhat"])
        lower, upper = item["lower_80"][-1], item["upper_80"][-1]
        interval = f" (80 %: {lower:.4g} to {upper:.4g})" if lower is not None else ""
        lines.append(
            f"{item['node']}  {item['metric']}: {item['last_value']:.4g} now, "
            f"{last:.4g}{interval} {item['unit']} in {seconds:g} s"
        )
    for item in answer.get("results", []):
        errors = ", ".join(f"{name} {value:.4g}" for name, value in item["mae"].items())
        lines.append(
            f"{item['node']}  {item['metric']}: mean absolute error in {item['unit']}: {errors}; "
            f"best: {item['best']}"
        )
    lines += [f"{i['node']}  {i['metric']}: none: {i['reason']}" for i in answer["unavailable"]]
    return lines


def _address(value: str) -> str:
    try:
        return address(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value!r} {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="icos-fl-client", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("forecast", "what comes next, with intervals"),
        ("backtest", "errors on the rows that no node trained on"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--processor", required=True, metavar="HOST:PORT", type=_address)
        command.add_argument(
            "--store",
            required=True,
            metavar="HOST:PORT",
            type=_address,
            help="dataClay's metadata service",
        )
        for name, what in _FILES.items():
            command.add_argument(f"--processor-{name}", metavar="FILE", type=Path, help=what)
        command.add_argument("--node", action="append", help="one node; may be given again")
        command.add_argument("--metric", action="append", help="one metric; may be given again")
        command.add_argument("--json", action="store_true", help="JSON on standard output")
    check = commands.add_parser("check", help="check a run configuration without running it")
    check.add_argument("file", type=Path, help="TOML, as flwr run --run-config takes it")
    return parser


if __name__ == "__main__":
    main()
