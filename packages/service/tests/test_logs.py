"""Logs as a process without a terminal writes them: each line is JSON."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import logging, threading, warnings
import structlog
from icos_fl_service import logs
logs.configure("INFO")
logs.configure_libraries()
structlog.get_logger().info("store answers", port=1)
structlog.get_logger().debug("not told")
logging.getLogger("grpc._server").warning("%s is %s", "it", "late")
logging.getLogger("grpc._server").info("not told")
try:
    1 / 0
except ZeroDivisionError:
    structlog.get_logger().exception("unexpected")
    logging.getLogger("dataclay").exception("unexpected there")
warnings.warn("old")
def fail():
    token = "s3cret"
    raise OSError("disk on fire")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
fail()
"""


@pytest.fixture(scope="module")
def done():
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )


def test_an_error_is_told_without_the_values_of_variables(done):
    assert "disk on fire" in done.stderr
    assert "s3cret" not in done.stderr


def test_every_line_is_json_whoever_tells_it(done):
    assert done.returncode == 1  # it ended by an error that nobody caught
    lines = map(json.loads, done.stderr.splitlines())
    answers, late, ours, theirs, warning, of_thread, uncaught = lines
    assert (answers["event"], answers["port"], answers["level"]) == ("store answers", 1, "info")
    assert answers["timestamp"].endswith("Z")
    assert (late["event"], late["logger"], late["level"]) == (
        "it is late",
        "grpc._server",
        "warning",
    )
    for line in (ours, theirs):
        assert line["exception"][0]["exc_type"] == "ZeroDivisionError"
    assert "UserWarning: old" in warning["event"]
    for line in (of_thread, uncaught):
        assert line["level"] == "critical"
        assert line["exception"][0]["exc_value"] == "disk on fire"
