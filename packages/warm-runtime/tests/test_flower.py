"""What the warm runtime relies on of Flower, and what it does when that is not so."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

import pytest
from icos_fl_service.testing import free_port
from icos_fl_warm_runtime.flower.names import NAMES, SUPEREXEC, changed

WARNS = "This Flower is not the one that the warm runtime was written for"
EDITED = """
import sys
from icos_fl_warm_runtime import __main__
from icos_fl_warm_runtime.flower.names import NAMES
name = {name!r}
of = NAMES[{command!r}]
of[next(iter(of))] = "otherwise"
sys.argv.insert(1, name)
__main__.main()
"""
"""Runs a command that was written against another Flower."""


@pytest.mark.parametrize(
    ("command", "name"),
    [(command, name) for command, names in NAMES.items() for name in names],
)
def test_flower_is_as_the_warm_runtime_knows_it(command, name):
    known = NAMES[command][name]
    assert changed({name: known}) == [], f"{name} has changed in Flower {version('flwr')}"


def test_what_changed_is_named_and_nothing_else():
    names = dict(SUPEREXEC)
    edited = "flwr.supercore.superexec.executor.types:Executor"
    names[edited] = "00000000"
    assert changed(names) == [edited]


@pytest.mark.parametrize(
    "gone",
    [
        "flwr.no_such_module:function",
        "flwr.superlink.main:no_such_function",
        "flwr.superlink.grid.http_grid:HttpGrid.no_such_method",
    ],
)
def test_what_is_gone_is_named(gone):
    assert changed({gone: "00000000"}) == [f"{gone} (gone)"]


def test_every_name_that_is_replaced_is_there_to_be_replaced():
    for module, name in (
        ("flwr.superlink.cli.flower_superlink", "subprocess"),
        ("flwr.supernode.start_client_internal", "subprocess"),
        ("flwr.supernode.cli.flower_supernode", "NodeStateFactory"),
        ("flwr.supercore.superexec.run_superexec", "get_executor"),
        ("flwr.supercore.superexec.run_superexec", "_get_task_poll_interval"),
        ("flwr.supercore.superexec.run_superexec", "make_simple_http_retry_invoker"),
        ("flwr.supernode.fleet_http_connection", "make_simple_http_retry_invoker"),
        ("flwr.supernode.fleet_http_connection", "FleetHttpClient"),
    ):
        assert hasattr(import_module(module), name), f"{module}:{name}"


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "icos_fl_warm_runtime", *arguments],
        env={"PATH": "/usr/bin:/bin", "FLWR_TELEMETRY_ENABLED": "0", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_runtime_that_does_not_exist_is_refused_in_one_line():
    done = command("supernode", "--help", ICOS_FL_RUNTIME="hot")
    assert done.returncode != 0
    assert done.stderr == "ICOS_FL_RUNTIME='hot': neither 'warm' nor 'stock'\n"
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [[], ["superman"]])
def test_a_command_that_does_not_exist_is_refused_in_one_line(arguments):
    done = command(*arguments)
    assert done.returncode != 0
    assert done.stderr == "usage: python -m icos_fl_warm_runtime superlink|supernode|superexec …\n"


def test_the_options_are_those_of_flowers_command():
    stock = subprocess.run(
        [sys.executable, "-c", STOCK_HELP],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert command("supernode", "--help", COLUMNS="100").stdout == stock.stdout
    assert "usage: flower-supernode " in stock.stdout


STOCK_HELP = """
import os, sys
os.environ["COLUMNS"] = "100"
sys.argv = ["flower-supernode", "--help"]
from flwr.supernode.cli.flower_supernode import flower_supernode
flower_supernode()
"""


def edited(name: str, part: str) -> list[str]:
    return [sys.executable, "-c", EDITED.format(name=name, command=part)]


def warm_processes(federation, name: str) -> list[str]:
    return [line for line in federation.commands(name) if "icos_fl_warm_runtime" in line]


def completes(federation) -> list[dict]:
    facts = federation.run({1: {"fault": "raises", "node": 1}}, rounds=2).end(240)
    assert [fact["replied"] for fact in facts] == [[0], [0, 1]]
    return facts


def test_on_a_flower_that_changed_the_commands_warn_and_run_as_stock(new_federation):
    federation = new_federation()
    federation.superlink(command=edited("superlink", "superlink"))
    federation.supernode(0, command=edited("supernode", "supernode"))
    federation.supernode(1)  # warm, with a SuperLink that is not
    completes(federation)
    for name, part in (("superlink", "superlink"), ("supernode-0", "supernode")):
        log = federation.log(name)
        first = next(iter(NAMES[part]))
        assert f'{WARNS}; taking the stock path. Changed: {first}"' in log
        assert len(warm_processes(federation, name)) == 1  # the command itself
    assert WARNS not in federation.log("supernode-1")
    assert federation.workers("supernode-1")


def test_stock_and_warm_supernodes_work_with_a_warm_superlink(new_federation):
    federation = new_federation()
    federation.superlink()
    federation.supernode(0, runtime="stock")
    federation.supernode(1)
    completes(federation)
    assert len(warm_processes(federation, "supernode-0")) == 1
    assert federation.workers("supernode-1")
    assert WARNS not in federation.logs()


@pytest.mark.slow
def test_a_warm_superexec_leaves_a_stock_supernode_to_find_out_who_died(new_federation):
    federation = new_federation()
    federation.superlink()
    port = free_port()
    federation.supernode(0)
    federation.supernode(1, "--isolation", "process", runtime="stock", port=port)
    federation.superexec("superexec-1", port, "--insecure")
    faults = {2: {"fault": "exits-0", "node": 1, "timeout": 5, "ttl": 5}}
    facts = federation.run(faults, rounds=3, timeout=120.0).end(240)
    print(f"\n{[round(fact['seconds'], 1) for fact in facts]}")
    # Flower takes the token back after 60 s; then the node answers, and takes the next message.
    assert [fact["replied"] for fact in facts] == [[0, 1], [0], [0, 1]]
    assert federation.workers("superexec-1")
