"""Every command of README.md, docs/ and examples/ is run as a reader would, page by page.

    uv run pytest -m slow tests/test_docs.py -v

runs them all, in a copy of this tree with an environment of its own: a quarter of an hour on two
idle cores. It needs what the pages need, Debian's prometheus and deploy/build-sources included. CI
looks only whether each command can be what it says.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from icos_fl_local.__main__ import _parser as icos_fl_parser

ROOT = Path(__file__).parents[1]
PAGES = [
    Path("README.md"),
    *sorted(file.relative_to(ROOT) for file in ROOT.glob("docs/*.md")),
    *sorted(file.relative_to(ROOT) for file in ROOT.glob("examples/*/README.md")),
]
COMMAND_SECONDS = 1_800.0
END_SECONDS = 60.0

NOT_RUN = {
    "uv run pytest -n 2 --dist loadfile": "it would run this test; .ci/run runs it",
    "uv run icos-fl backtest --traces deploy/local/src/icos_fl_local/traces --node pfe1": (
        "on a shorter trace: deploy/local/tests/test_backtest.py::test_commands_of_the_docs_run"
    ),
    "uv run icos-fl backtest --traces deploy/local/src/icos_fl_local/traces --node pfe1"
    " --metric cpu_usage --horizon 5m --html backtest.html --csv forecasts.csv": (
        "on a shorter trace: deploy/local/tests/test_backtest.py::test_commands_of_the_docs_run"
    ),
    "uv run icos-fl backtest --forecaster 127.0.0.1:50052 --json": (
        "at another port: deploy/local/tests/test_backtest.py::test_commands_of_the_docs_run"
    ),
    "kubectl apply -f deploy/monitoring/keda.yaml": "no cluster is here",
    "uvx pip-audit --strict --no-deps --disable-pip -r requirements.txt": (
        "asks services that cannot be reached from everywhere, as the page says"
    ),
    "deploy/release icos-fl-processor": "makes a release; in a clone: tests/test_release.py",
    "deploy/release icos-fl-processor --version 0.2.1": (
        "makes a release; in a clone: tests/test_release.py"
    ),
    "git archive TREE_OF_RELEASES_TOML | tar -x -C DIR && uv build --wheel DIR": (
        "for each release: tests/upgrade/conftest.py"
    ),
}
"""Commands that are not run here, each with its reason or with the test that runs it."""

LASTS = {
    "prometheus --config.file=.icos-fl/prometheus.yml": "Server is ready to receive web requests",
    "uv run icos-fl up --source host": r"window of .*: \d\d of",
    "uv run icos-fl up --source collector": r"window of .*: \d\d of",
}
"""Commands that go on until Ctrl-C, which comes when they have said this."""

BESIDE = {
    "uv run python examples/bring-a-metric/exporter.py 127.0.0.1:4317": "sending every 3 s",
}
"""Commands that go on until Ctrl-C beside those that follow, which wait until it has said this."""

WAITED_FOR_SECONDS = {
    "curl -s 127.0.0.1:9464/metrics | grep 'yhat.*network_receive'": 120.0,
    "uv run icos-fl train -c metric=network_receive --rounds 2": 600.0,
}
"""Commands that the page says to wait for: they may fail until rows are there."""

SHORTER = {
    "uv run icos-fl simulate --nodes 100 --rounds 3": "--nodes 10 --rounds 1",
    "uv run icos-fl simulate --sweep learning-rate=0.002,0.008 --seeds 2": (
        "--nodes 1 --rounds 1 --seeds 1 --metric cpu_usage"
    ),
    "uv run icos-fl simulate --sweep learning-rate=0.001,0.002,0.005"
    " --sweep hidden-layer-size=8,16 --seeds 3": "--nodes 1 --rounds 1 --seeds 1",
}
"""Options that end a command in minutes in place of an hour."""

FILLED_IN = {"DIR": "deploy/local/src/icos_fl_local/traces"}


def commands(page: Path) -> list[str]:
    """Those of the page's ``sh`` blocks, in order, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines)
    return [" ".join(command.split()) for command in found if command]


ALL = [command for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("table", [NOT_RUN, LASTS, BESIDE, WAITED_FOR_SECONDS, SHORTER])
def test_the_tables_name_commands_that_stand_there(table):
    assert sorted(table.keys() - set(ALL)) == []


def test_what_is_not_run_here_is_run_by_a_test_that_there_is():
    named = [
        reference for reason in NOT_RUN.values() for reference in re.findall(r"\S+\.py\S*", reason)
    ]
    for file, _, name in (reference.partition("::") for reference in named):
        assert f"def {name}" in (ROOT / file).read_text(), f"{file}::{name}"


def test_icos_fl_takes_its_command_lines(capsys):
    """Of all pages in the repository, also those that are not run."""
    refused = []
    for page in sorted(ROOT.rglob("*.md")):
        for command in commands(page) if ".venv" not in page.parts else ():
            asked = re.match(r"(?:\w+=\S+ )*(?:uv run )?icos-fl ([^|<>&]*)", command)
            try:
                if asked:
                    icos_fl_parser().parse_args(shlex.split(asked[1]))
            except SystemExit:
                refused.append(f"{page.relative_to(ROOT)}: {command}")
    assert refused == [], capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def anchors(file: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class Reader:
    """Types commands in a copy of this tree, in whose environment they are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = f"{folder / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
        self._env = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"} | {"PATH": path}
        self._log = folder.parent / "said.txt"

    def run(self, command: str, seconds: float = COMMAND_SECONDS) -> tuple[int, str]:
        """To its end: exit status, and what it printed."""
        with self._started(command) as process:
            process.wait(seconds)
        return process.returncode, self._log.read_text(errors="replace")

    @contextlib.contextmanager
    def beside(self, command: str, words: str) -> Iterator[None]:
        """From when it has said *words* until the block ends: then it gets a Ctrl-C."""
        with self._started(command) as process:
            log, until = self._log, time.monotonic() + COMMAND_SECONDS
            while not re.search(words, said := log.read_text(errors="replace")):
                assert process.poll() is None, f"{command} ended: {said}"
                assert time.monotonic() < until, f"{command} did not say {words!r}: {said}"
                time.sleep(0.2)
            yield
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(END_SECONDS) in (0, 128 + signal.SIGINT, -signal.SIGINT)

    @contextlib.contextmanager
    def _started(self, command: str) -> Iterator["subprocess.Popen[bytes]"]:
        self._log = self._log.with_name(f"{time.time_ns()}.txt")
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", command],
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("reader") / "icos-fl"
    listing = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return Reader(folder)


@pytest.mark.slow
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("page", [p for p in PAGES if set(commands(p)) - NOT_RUN.keys()], ids=str)
def test_all_commands_of_a_page_run_and_it_ends_what_it_started(page, reader):
    try:
        with contextlib.ExitStack() as beside:
            for command in commands(page):
                if command in NOT_RUN:
                    continue
                line = " ".join([command, SHORTER.get(command, "")])
                for word, value in FILLED_IN.items():
                    line = re.sub(rf"\b{word}\b", value, line)
                print(line, flush=True)
                if command in LASTS:
                    with reader.beside(line, LASTS[command]):
                        pass
                elif command in BESIDE:
                    beside.enter_context(reader.beside(line, BESIDE[command]))
                else:
                    until = time.monotonic() + WAITED_FOR_SECONDS.get(command, 0.0)
                    while (found := reader.run(line))[0] != 0 and time.monotonic() < until:
                        time.sleep(5.0)
                    assert found[0] == 0, found[1]
    finally:
        status, said = reader.run("uv run icos-fl down", END_SECONDS)
    assert status == 3, f"the page leaves something running: {said}"
