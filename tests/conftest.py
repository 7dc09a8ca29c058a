"""The last release of each package, from the history."""

import io
import subprocess
import tarfile
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Release:
    """A release of a package, as deploy/release has recorded it."""

    package: str
    version: str
    folder: str
    """Of the package, in this repository."""
    tree: str
    is_today: bool
    """Is its code what the package's code is now?"""

    def extract(self, to: Path) -> Path:
        """Write the package's folder as it was to *to*."""
        packed = subprocess.run(["git", "archive", self.tree], cwd=ROOT, stdout=subprocess.PIPE)
        assert packed.returncode == 0, f"{self.package} {self.version}: no tree {self.tree}"
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            archive.extractall(to, filter="data")
        return to

    def asks_for(self) -> list[Requirement]:
        """What pip installs with it."""
        project = tomllib.loads(git("show", f"{self.tree}:pyproject.toml"))["project"]
        return [Requirement(each) for each in project["dependencies"]]


def git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="session")
def last_releases() -> dict[str, Release]:
    """By package: the newest release whose code is not today's, or else the newest one; but where
    another of them asks for a later one, the first that does for it."""
    try:
        git("rev-list", "--objects", "-1", "HEAD")
        shallow = git("rev-parse", "--is-shallow-repository") == "true"
    except (OSError, subprocess.CalledProcessError):
        shallow = True
    if shallow:
        message = "NOT COMPARED WITH THE LAST RELEASE: this is no clone with its history"
        warnings.warn(message, stacklevel=2)
        pytest.skip(message)
    found: dict[str, Release] = {}
    every: list[Release] = []
    for entry in tomllib.loads((ROOT / "releases.toml").read_text())["release"]:
        package, folder, tree = entry["package"], entry["folder"], entry["tree"]
        is_today = not git("diff", "--stat", f"{tree}:src", f"HEAD:{folder}/src")
        every.append(Release(package, entry["version"], folder, tree, is_today))
        if package not in found or found[package].is_today or not is_today:
            found[package] = every[-1]
    while later := dict(_later(found, every)):
        found |= later
    return found


def _later(found: Mapping[str, Release], every: Sequence[Release]) -> Iterator[tuple[str, Release]]:
    """Of each package that is too old for one of *found*, a later release."""
    for asked in (each for release in found.values() for each in release.asks_for()):
        name = asked.name
        if name in found and found[name].version not in asked.specifier:
            fitting = (
                each for each in every if each.package == name and each.version in asked.specifier
            )
            yield name, next(fitting)
