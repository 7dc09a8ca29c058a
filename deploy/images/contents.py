"""What is in an image: a software bill of materials (CycloneDX), and Debian's packages."""

import os
import tarfile
import tempfile
import tomllib
import venv
from collections.abc import Iterable, Iterator
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from engine import BuildError, Engine, run
from packageurl import PackageURL


def write_contents(engine: Engine, tag: str, out: Path) -> int:
    """Write *out*.cdx.json and *out*.debian.txt for the image *tag*; returns its files' bytes."""
    bom = out.with_name(f"{out.name}.cdx.json")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A Python of this machine, with what describes the image's packages.
        venv.create(folder / "venv")
        site_packages = next(folder.glob("venv/lib/*/site-packages"))
        with engine.files(tag) as files:
            size = _extract(files, folder, site_packages)
        dpkg = run("dpkg-query", "--admindir", str(folder / "var/lib/dpkg"), "-W")
        out.with_name(f"{out.name}.debian.txt").write_text(dpkg)
        programs = folder / "usr/local/bin"
        if (program := programs / "otelcol-edge").exists():
            _write_bom(program.name, _go_modules(program), bom)
        elif (program := programs / "scaphandre").exists():
            _write_bom(program.name, _crates(program.name, tag.rpartition(":")[2]), bom)
        elif not any(site_packages.iterdir()):
            _write_bom(out.name, _debian_packages(dpkg), bom)
        else:
            run("cyclonedx-py", "environment", str(folder / "venv"), "--output-file", str(bom))
    return size


def _extract(files: tarfile.TarFile, folder: Path, site_packages: Path) -> int:
    """What the lists are made of, from *files* into these folders; the bytes of all files."""
    size = 0
    for file in files:
        size += file.size
        parts = Path(file.name).parts
        if "site-packages" in parts and parts[-2].endswith(".dist-info"):
            file.name = str(Path(*parts[-2:]))
            files.extract(file, site_packages, filter="data")
        elif parts[:3] in (("var", "lib", "dpkg"), ("usr", "local", "bin")):
            files.extract(file, folder, filter="data")
    return size


def _go_modules(program: Path) -> Iterator[PackageURL]:
    for line in run("go", "version", "-m", str(program)).splitlines():
        match line.split():
            case ["dep", module, version, *_]:
                group, _, name = module.rpartition("/")
                yield PackageURL("golang", group, name, version)


def _crates(name: str, version: str) -> Iterator[PackageURL]:
    """What the crate *name* is built of, by the lock file that cargo keeps with its source."""
    sources = Path(os.environ.get("CARGO_HOME", "~/.cargo")).expanduser() / "registry/src"
    lock = next(sources.glob(f"*/{name}-{version}/Cargo.lock"), None)
    if lock is None:
        raise BuildError(f"no {name}-{version}/Cargo.lock in {sources}; build {name} anew")
    for package in tomllib.loads(lock.read_text())["package"]:
        yield PackageURL("cargo", None, package["name"], package["version"])


def _debian_packages(listed: str) -> Iterator[PackageURL]:
    """Of *listed* as dpkg-query does it."""
    for line in listed.splitlines():
        package, version = line.split("\t")
        name, _, architecture = package.partition(":")
        qualifiers = {"arch": architecture} if architecture else None
        yield PackageURL("deb", "debian", name, version, qualifiers)


def _write_bom(program: str, packages: Iterable[PackageURL], path: Path) -> None:
    bom = Bom()
    bom.metadata.component = Component(name=program, type=ComponentType.APPLICATION)
    for url in packages:
        component = Component(name=url.name, group=url.namespace, version=url.version, purl=url)
        bom.components.add(component)
    writer = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6)
    writer.output_to_file(str(path), allow_overwrite=True, indent=2)
