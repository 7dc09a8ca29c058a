# /// script
# requires-python = ">=3.11"
# dependencies = ["cyclonedx-bom>=7,<8"]
# ///
"""Builds the images, icos-fl/NAME:VERSION, with docker or podman, whichever can be used.

Prints name, version, size against its budget, user and time of each, and leaves in dist/images what
is in it: NAME.cdx.json (CycloneDX) and NAME.debian.txt. Where no registry can be reached, the base
is made by debootstrap, which needs root.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from contents import write_contents
from engine import BuildError, Engine, run
from images import IMAGES, ROOT

TORCH_INDEX = "https://download.pytorch.org/whl/cpu/torch/"
CUDA_BUDGET_MB = 6500


@dataclass(frozen=True)
class Built:
    """An image, as the table shows it."""

    tag: str
    size_mb: float
    budget_mb: int
    user: str
    seconds: float

    @property
    def over(self) -> bool:
        """Is it larger than it may be?"""
        return self.size_mb > self.budget_mb

    def line(self) -> str:
        """A row of the table."""
        size = f"{self.size_mb:>7.0f}{self.budget_mb:>9}"
        over = "  over its budget" if self.over else ""
        return f"{self.tag:<34}{size}  {self.user:<13}{self.seconds:>8.1f}{over}"


def main() -> int:
    """Exit status 0; 1 if an image cannot be built or is over its budget; 2 for wrong usage."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        # The Dockerfiles install what is in the lock, and have not all that it is made from.
        run("uv", "lock", "--check", "--quiet", "--project", str(ROOT))
        engine = Engine()
        base = engine.base()
        engine.make_build_base(base)
        torch = arguments.torch or ("cpu" if _reachable(TORCH_INDEX) else "cpu-from-pypi")
        built = [
            _build(engine, name, base, torch, arguments.out) for name in arguments.names or IMAGES
        ]
    except (BuildError, subprocess.CalledProcessError) as error:
        print(f"build-images: {error}", file=sys.stderr)
        return 1
    print(f"base {base}; {engine.command}; torch of fl-client: {torch}\n")
    print(f"{'image':<34}{'MB':>7}{'budget':>9}  {'user':<13}{'seconds':>8}")
    print("\n".join(image.line() for image in built))
    return int(any(image.over for image in built))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="build-images", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(IMAGES)}; all")
    parser.add_argument(
        "--torch",
        choices=("cpu", "cpu-from-pypi", "cuda"),
        help="of fl-client: PyTorch's build for the CPU (the default where its index can be "
        "reached), PyPI's without what only a GPU uses, or PyPI's with CUDA",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist/images", metavar="DIR")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(IMAGES):
        parser.error(f"no such image: {', '.join(sorted(unknown))}; there are {', '.join(IMAGES)}")
    return arguments


def _build(engine: Engine, name: str, base: str, torch: str, out: Path) -> Built:
    image, started = IMAGES[name], time.monotonic()
    tag = f"icos-fl/{name}:{image.version()}"
    arguments = {"BASE": base} | ({"TORCH": torch} if name == "fl-client" else {})
    labels = {
        "version": image.version(),
        "revision": run("git", "-C", str(ROOT), "rev-parse", "HEAD").strip(),
        "source": _origin(),
    }
    with tempfile.TemporaryDirectory() as folder:
        sources = _provide(image.program, Path(folder)) if image.program else None
        dockerfile = ROOT / image.folder / "Dockerfile"
        engine.build(tag, dockerfile, ROOT, arguments, labels, sources)
    seconds = time.monotonic() - started
    size = write_contents(engine, tag, out / name)
    budget = CUDA_BUDGET_MB if name == "fl-client" and torch == "cuda" else image.budget_mb
    return Built(tag, size / 1e6, budget, engine.user(tag), seconds)


def _origin() -> str:
    """Where the repository was cloned from, without a name or password; empty where nowhere."""
    url = run("git", "-C", str(ROOT), "config", "--default", "", "--get", "remote.origin.url")
    return re.sub(r"//[^/@]*@", "//", url.strip())


def _provide(program: str, folder: Path) -> Path:
    """*folder* with *program* of deploy/build-sources, which builds it if need be."""
    done = subprocess.run(
        [ROOT / "deploy/build-sources"], stdout=subprocess.PIPE, text=True, check=False
    )
    paths = dict(line.split("=", 1) for line in done.stdout.splitlines())
    if program not in paths:
        raise BuildError(f"there is no {program}; the lines above say why")
    shutil.copy(paths[program], folder / program)
    return folder


def _reachable(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 - a constant
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
