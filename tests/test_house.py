"""The house's rules, checked by the tools that own them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("packages/*/src"), ROOT / "protos/src", ROOT / "deploy/local/src"]
DOCKERFILES = sorted(ROOT.glob("*/*/Dockerfile"))
SCRIPTS = [
    ROOT / ".ci/run",
    *ROOT.glob("deploy/build-*"),
    ROOT / "deploy/rehearse",
    ROOT / "deploy/helm/icos-fl/setup",
    ROOT / "packages/fl-client/install",
]
BIN = Path(sys.executable).parent


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check"),
        ("ruff", "format", "--check"),
        ("mypy", *(str(source.relative_to(ROOT)) for source in SOURCES), "benchmarks"),
        ("lint-imports",),
        ("hadolint", *map(str, DOCKERFILES)),
        ("shellcheck", "--severity", "warning", *map(str, SCRIPTS)),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_tool_finds_nothing(command: tuple[str, ...]):
    done = run(str(BIN / command[0]), *command[1:])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("icos_fl_otlp_bridge", "import icos_fl_processor", "Services never import services"),
        ("icos_fl_server", "import torch", "torch in fl-client alone"),
        ("icos_fl_processor", "import dataclay", "dataClay in timeseries-store alone"),
        ("icos_fl_timeseries_store", "import icos_fl_processor", "Layers"),
        ("icos_fl_service", "import icos_fl_timeseries_store", "Layers"),
        ("icos_fl_local", "import icos_fl_client", "The launcher starts services"),
        ("icos_fl_client/forecasting", "import torch", "Forecasting is numpy alone"),
    ],
)
def test_planted_import_is_refused(tmp_path: Path, module: str, line: str, contract: str):
    for source in SOURCES:
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    (tmp_path / module / "planted.py").write_text(f"{line}\n")

    done = run(str(BIN / "lint-imports"), "--no-cache", PYTHONPATH=str(tmp_path))

    broken = [row for row in done.stdout.splitlines() if " BROKEN" in row]
    assert done.returncode == 1
    assert any(row.startswith(contract) for row in broken), done.stdout


def test_committed_stubs_are_those_of_the_protos(tmp_path: Path):
    protos = sorted((ROOT / "protos/icos_fl").rglob("*.proto"))
    done = run(
        sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}",
        f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}",
        *map(str, protos),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.py*")}
    committed = {path: (ROOT / "protos/src" / path).read_text() for path in fresh}
    assert len(fresh) == 3 * len(protos)
    assert fresh == committed
