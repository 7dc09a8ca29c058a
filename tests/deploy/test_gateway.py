"""What the gateway refuses before it becomes nginx."""

import subprocess
from pathlib import Path

import pytest

GATEWAY = Path(__file__).parents[2] / "deploy/gateway/gateway"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("SUPERLINKS", "a:1", "ICOS_FL_GATEWAY_SUPERLINKS: no such setting"),
        ("SUPERLINK", "a", "'a': not of the form host:port"),
        ("ENROLMENT", "a:b", "'a:b': not of the form host:port"),
        ("ENROLMENT", "a:", "'a:': not of the form host:port"),
        ("LISTEN", "eth0", "'eth0': neither a port nor of the form address:port"),
        ("LISTEN", "1; }", "'1; }': neither an address nor a path"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(tmp_path: Path, name, value, told):
    assert refused(tmp_path, **{name: value}) == f"gateway: {told}\n"


def test_a_relative_folder_is_one_of_the_current_folder(tmp_path: Path):
    told = refused(tmp_path, SECRETS="certs")
    assert told.startswith(f"gateway: {tmp_path}/certs/gateway.pem: cannot be read")


def refused(folder: Path, **settings: str) -> str:
    environment = {f"ICOS_FL_GATEWAY_{name}": value for name, value in settings.items()}
    done = subprocess.run(
        [GATEWAY], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr
