import io
from pathlib import Path

from icos_fl_local.progress import Progress


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_elsewhere_than_on_a_terminal_a_change_is_a_line() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.component("bridge", "starting")
        progress.component("bridge", "up")
        progress.rows("node-a", 60, 1200)
        progress.rows("node-a", 120, 1200)  # too soon after the line before
        progress.rows("node-a", 1200, 1200)
        progress.training("round 1 of 5: running")
        progress.training("round 1 of 5: running")
        progress.component("bridge", "stopping")
        progress.component("bridge", "stopped")
    assert lines(stream) == [
        "bridge: up",
        "window of node-a: 60 of 1,200 rows",
        "window of node-a: 1,200 of 1,200 rows",
        "round 1 of 5: running",
        "bridge: stopped",
    ]


def test_a_long_line_is_not_broken() -> None:
    stream = io.StringIO()
    Progress(stream).say("word " * 100)
    assert len(lines(stream)) == 1


def test_square_brackets_are_no_markup() -> None:
    stream = io.StringIO()
    Progress(stream).say("[red]load[/red]")
    assert lines(stream) == ["[red]load[/red]"]


def test_stages_are_timed_one_after_the_other() -> None:
    progress = Progress(io.StringIO())
    progress.stage("start")
    progress.stage("feed")
    assert [stage["name"] for stage in progress.stages] == ["start", "feed"]
    assert progress.timing().startswith("took 0.0 s: start 0.0 s, feed 0.0 s")


def test_a_full_disk_loses_lines_and_ends_nothing() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        progress = Progress(io.TextIOWrapper(full, write_through=True))
        progress.say("bridge: up")
        progress.say("processor: up")
