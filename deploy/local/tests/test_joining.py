"""``icos-fl node join`` where there is no controller; tests/e2e has one."""

import base64
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trustme

GOOD = {"name": "edge-1", "secret": "s" * 43, "expires_unix_s": int(time.time()) + 60}


def invitation(gateway: str, **changed: object) -> str:
    pem = trustme.CA().cert_pem.bytes().decode()
    body = "".join(pem.split("-----")[2].split())
    facts = GOOD | {"gateway": gateway, "authority": body} | changed
    return "icosfl1." + base64.urlsafe_b64encode(json.dumps(facts).encode()).decode().rstrip("=")


def join(folder: Path, *arguments: str, given: str = "") -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "icos_fl_local", "node", "join", *arguments],
        cwd=folder, input=given, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    "word",
    ["", "hello", "icosfl1.", invitation("a:1")[:-40], invitation("a:1", authority="x")],
    ids=["empty", "word", "prefix", "cut", "authority"],
)
def test_what_is_no_invitation_is_said(tmp_path: Path, word: str) -> None:
    status, lines = join(tmp_path, "-", given=word)
    assert (status, len(lines)) == (2, 1)
    assert "this is no invitation, or not all of it; 'icos-fl node invite NAME'" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_gateway_that_is_away_is_told_with_its_address(tmp_path: Path, nobody: str) -> None:
    expected = f"icos-fl: the gateway at {nobody} does not answer: Connection refused"
    assert join(tmp_path, invitation(nobody)) == (1, [expected])


def test_a_name_that_nobody_knows_is_told_too(tmp_path: Path) -> None:
    status, lines = join(tmp_path, invitation("gateway.invalid:8443"))
    assert (status, len(lines)) == (1, 1)
    assert lines[0].startswith("icos-fl: the gateway at gateway.invalid:8443 does not answer: ")


def test_the_key_is_there_before_and_stays_the_same(tmp_path: Path, nobody: str) -> None:
    word = invitation(nobody)
    broken = "\n".join(word[at : at + 80] for at in range(0, len(word), 80))
    join(tmp_path, "-", given=broken)  # as a terminal gives it
    key = tmp_path / "node" / "supernode.key"
    first = key.read_bytes()
    join(tmp_path, word)
    assert key.read_bytes() == first
    assert oct(key.stat().st_mode)[-3:] == "600"


def test_a_key_that_is_none_is_named(tmp_path: Path, nobody: str) -> None:
    (tmp_path / "supernode.key").write_text("nonsense")
    status, lines = join(tmp_path, invitation(nobody), "--folder", ".")
    assert (status, len(lines)) == (1, 1)
    assert "supernode.key: no private key in OpenSSH's form; delete it" in lines[0]
