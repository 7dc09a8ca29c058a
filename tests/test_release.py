"""deploy/release in a clone of this repository, and what it wrote down in this one."""

import os
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "icos-fl-service"
SOMEBODY = {
    f"GIT_{role}_{fact}": value
    for role in ("AUTHOR", "COMMITTER")
    for fact, value in (("NAME", "somebody"), ("EMAIL", "somebody@example.org"))
}


def git(folder: Path, *command: str) -> str:
    done = subprocess.run(
        ["git", *command],
        cwd=folder, env=os.environ | SOMEBODY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def release(folder: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [folder / "deploy/release", *arguments],
        cwd=folder, env=os.environ | SOMEBODY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def history() -> None:
    if not (ROOT / ".git").exists() or git(ROOT, "rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("RELEASES WERE NOT TESTED: this is no clone with its history")


def clone_with_a_change(folder: Path) -> Path:
    """A clone with one change of PACKAGE that is not released."""
    git(ROOT, "clone", "--quiet", "--no-tags", str(ROOT), str(folder))
    for name in ("deploy/release", "towncrier.toml"):  # as they are now
        shutil.copy(ROOT / name, folder / name)
    for file in folder.glob("packages/service/changelog.d/*.md"):
        file.unlink()
    (folder / "packages/service/changelog.d/tea.added.md").write_text("It makes tea.\n")
    (folder / "packages/service/src/icos_fl_service/tea.py").write_text("TEA = 1\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "tea")
    return folder


def releases(folder: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = tomllib.loads((folder / "releases.toml").read_text())["release"]
    return found


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone after a release of PACKAGE as 0.99.0."""
    clone = clone_with_a_change(tmp_path_factory.mktemp("released") / "clone")
    status, told = release(clone, PACKAGE, "--version", "0.99.0")
    assert status == 0, told
    return clone


def test_a_release_is_a_commit_a_tag_a_record_a_changelog_and_a_wheel(released: Path):
    service = released / "packages/service"
    assert git(released, "status", "--porcelain") == ""
    assert git(released, "rev-parse", f"{PACKAGE}-v0.99.0^{{commit}}") == git(
        released, "rev-parse", "HEAD"
    )
    assert releases(released)[-1]["tree"] == git(released, "rev-parse", "HEAD:packages/service")
    assert "\n## 0.99.0 (" in (service / "CHANGELOG.md").read_text()
    assert "- It makes tea.\n" in (service / "CHANGELOG.md").read_text()
    assert [file.name for file in (service / "changelog.d").iterdir()] == [".gitkeep"]
    assert subprocess.run(["uv", "lock", "--check", "--quiet"], cwd=released).returncode == 0
    with zipfile.ZipFile(released / "dist/icos_fl_service-0.99.0-py3-none-any.whl") as wheel:
        assert "icos_fl_service/tea.py" in wheel.namelist()


@pytest.fixture(scope="module")
def sibling(released: Path) -> Path:
    """The clone after a release of one of PACKAGE's siblings, which is an image."""
    (released / "packages/timeseries-store/changelog.d/cups.fixed.md").write_text("Cups.\n")
    git(released, "add", "--all")
    git(released, "commit", "--quiet", "--message", "cups")
    status, told = release(released, "icos-fl-timeseries-store", "--version", "0.98.0")
    assert status == 0, told
    return released


def test_a_sibling_asks_for_what_was_released_or_later(sibling: Path):
    pyproject = (sibling / "packages/timeseries-store/pyproject.toml").read_text()
    assert '"icos-fl-service>=0.99,<1"' in pyproject


def test_the_deployments_run_what_was_released(sibling: Path):
    """And of the other images what they ran."""
    path = "deploy/helm/icos-fl/values.yaml"
    changes = git(sibling, "diff", "HEAD~", "--unified=0", "--", path).splitlines()
    added = [line for line in changes if line.startswith("+ ")]
    assert added == ['+    timeseries-store: "0.98.0"']


def test_what_is_not_ready_is_refused_and_nothing_is_changed(tmp_path: Path):
    clone = clone_with_a_change(tmp_path / "clone")
    head = git(clone, "rev-parse", "HEAD")
    assert release(clone, "icos-fl-warm-runtime")[1].startswith(
        f"release: {PACKAGE} has changed since "
    )
    assert "is not later" in release(clone, PACKAGE, "--version", "0.0.9")[1]
    (clone / "notes").touch()
    status, told = release(clone, PACKAGE)
    assert (status, told) == (1, "release: the working tree is not clean:\n?? notes\n")
    (clone / "notes").unlink()
    assert git(clone, "status", "--porcelain") == ""
    assert git(clone, "rev-parse", "HEAD") == head


def test_every_release_can_be_found_in_the_history():
    objects = set(git(ROOT, "rev-list", "--objects", "--no-object-names", "HEAD").split())
    missing = [entry for entry in releases(ROOT) if entry["tree"] not in objects]
    assert missing == []
