"""A run whose ServerApp dies without a word, on a real SuperLink."""

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from icos_fl_local import run
from icos_fl_local.deployment import Deployment, assign_ports
from icos_fl_local.errors import LocalError
from icos_fl_local.progress import Progress
from icos_fl_local.state import StateFolder
from icos_fl_local.supervisor import Supervisor

PYPROJECT = """
[project]
name = "dying"
version = "1.0.0"
dependencies = ["flwr"]
[tool.flwr.app]
publisher = "test"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
result-dir = ""
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, Supervisor]]:
    """A SuperLink without nodes."""
    state = StateFolder(tmp_path_factory.mktemp("state"))
    ports = assign_ports(["superlink", "processor", "metadata", "metrics-superlink"], {})
    deployment = Deployment(state, (), ports)
    with state.lock(), Supervisor(state.logs, deployment.env()) as supervisor:
        supervisor.start(deployment._flower())
        yield deployment, supervisor


def app_in(folder: Path, code: str) -> Path:
    """A Flower app whose ServerApp runs *code* when it is imported."""
    app = folder / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PYPROJECT)
    (app / "server_app.py").write_text(
        f"{code}\nfrom flwr.serverapp import ServerApp\napp = ServerApp()\n"
    )
    (app / "client_app.py").write_text("from flwr.clientapp import ClientApp\napp = ClientApp()\n")
    return app


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import module_that_is_not_there", "No module named 'module_that_is_not_there'"),
        ("import os; os._exit(3)", "exit status 3"),
    ],
    ids=["raises", "exits"],
)
def test_a_serverapp_that_dies_at_import_is_told_as_soon_as_its_log_ends(
    running: tuple[Deployment, Supervisor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    reason: str,
) -> None:
    monkeypatch.setattr(run, "_SILENCE_SECONDS", float("inf"))
    died = tmp_path / "died"
    code = f"from pathlib import Path\nPath({str(died)!r}).touch()\n{code}"
    app = app_in(tmp_path, code)
    config = {"result-dir": str(tmp_path / "result")}
    with pytest.raises(LocalError) as raised:
        run.train(*running, config, Progress(io.StringIO()), app=app)
    print(f"\ntold {time.time() - died.stat().st_mtime:.1f} s after: {raised.value}")
    assert reason in str(raised.value)
    history = run.read_history(tmp_path / "result/history.json")
    assert history is not None
    assert history["state"] == "failed"
    assert reason in history["reason"]


def test_a_run_ends_that_a_superlink_which_was_started_again_does_not_know(
    running: tuple[Deployment, Supervisor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, supervisor = running
    monkeypatch.setattr(run, "_SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(supervisor, "restarts", True)
    begun = tmp_path / "begun"
    app = app_in(
        tmp_path, f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(600)"
    )
    before = supervisor.pids["superlink"]

    def kill() -> None:
        while not begun.exists():
            time.sleep(0.1)
        os.kill(before, signal.SIGKILL)

    killing = threading.Thread(target=kill, daemon=True)
    killing.start()
    config = {"result-dir": str(tmp_path / "result")}
    with pytest.raises(LocalError, match="the SuperLink was started again meanwhile"):
        run.train(*running, config, Progress(io.StringIO()), app=app)
    assert supervisor.ended["superlink"].how == "killed by SIGKILL"
    assert supervisor.pids["superlink"] != before
    history = run.read_history(tmp_path / "result/history.json")
    assert (history or {})["state"] == "failed"
