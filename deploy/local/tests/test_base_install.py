"""What ``pip install icos-fl`` brings, in an environment of its own."""

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a command of the environment."""
    home = tmp_path_factory.mktemp("base")
    made = subprocess.run(
        ["uv", "sync", "--locked", "--no-dev", "--package", "icos-fl"],
        cwd=ROOT,
        env=os.environ | {"UV_PROJECT_ENVIRONMENT": str(home / "venv")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(home / "venv/bin" / command), *arguments],
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_it_is_small(run):
    names = "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()))"
    assert run("python", "-c", names).stdout.split() == [
        "cffi",
        "cryptography",
        "icos-fl",
        "pycparser",
    ]


def test_it_makes_certificates_and_shows_them(run):
    assert run("icos-fl", "certs", "node", "--name", "edge-1").returncode == 0
    shown = run("icos-fl", "certs", "show")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "ok       processor.pem    server for edge-1, processor" in shown.stdout


@pytest.mark.parametrize(
    "arguments",
    [["up"], ["watch"], ["train"], ["simulate"], ["doctor"], ["down"]],
    ids=lambda arguments: arguments[0],
)
def test_what_is_about_services_says_that_they_are_missing(run, arguments: list[str]):
    done = run("icos-fl", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"icos-fl: {arguments[0]} is about services on this machine, and they are not installed: "
        "pip install 'icos-fl[local]'\n"
    )


def test_it_tells_the_status_of_parts_of_a_federation(run):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
    done = run("icos-fl", "status", address)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"down at {address}; no status: Connection refused\n"
