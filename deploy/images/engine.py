"""docker or podman, and the bases of the images."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

REGISTRY_BASE = "debian:bookworm-slim"
OWN_BASE = "icos-fl/debian:bookworm"
BUILD_BASE = "icos-fl/build-base:latest"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_UNUSED = ("usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man")


class BuildError(Exception):
    """Why there is no image; one line."""


def run(*command: str) -> str:
    """What *command* prints; what it says of errors goes to standard error."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


class Engine:
    """The commands that docker and podman share. Raises BuildError where there is neither."""

    def __init__(self) -> None:
        self.command = next((name for name in ("docker", "podman") if _works(name, "info")), "")
        if not self.command:
            raise BuildError("neither docker nor podman can be used on this machine")

    def base(self) -> str:
        """What the images are built on: the registry's Debian, or one made here."""
        if _works(self.command, "pull", "--quiet", f"docker.io/library/{REGISTRY_BASE}"):
            return REGISTRY_BASE
        if not _works(self.command, "image", "inspect", OWN_BASE):
            print("no registry can be reached: debootstrap makes the base", file=sys.stderr)
            with tempfile.TemporaryDirectory() as folder:
                root, archive = Path(folder, "root"), Path(folder, "root.tar")
                _debootstrap(root)
                run("tar", "-C", str(root), "-cf", str(archive), ".")
                run(self.command, "import", str(archive), OWN_BASE)
        return OWN_BASE

    def make_build_base(self, base: str) -> None:
        """*base* with this machine's certificates and package indexes, for build stages alone."""
        configured = {
            _CERTIFICATES: "/usr/local/share/ca-certificates/build-machine.crt",
            "/etc/pip.conf": "/etc/pip.conf",
            "~/.config/pip/pip.conf": "/etc/pip.conf",
            "/etc/uv/uv.toml": "/etc/uv/uv.toml",
            "~/.config/uv/uv.toml": "/etc/uv/uv.toml",
        }
        with tempfile.TemporaryDirectory() as name:
            folder, lines = Path(name), [f"FROM {base}"]
            for number, (source, target) in enumerate(configured.items()):
                if (path := Path(source).expanduser()).exists():
                    shutil.copy(path, folder / str(number))
                    lines.append(f"COPY {number} {target}")
            lines += [
                f"ENV {variable}={json.dumps(value)}"
                for variable, value in os.environ.items()
                if variable.startswith(("PIP_", "UV_")) and "INDEX" in variable
            ]
            (folder / "Dockerfile").write_text("\n".join(lines) + "\n")
            self.build(BUILD_BASE, folder / "Dockerfile", folder, {}, {})

    def build(
        self,
        tag: str,
        dockerfile: Path,
        context: Path,
        arguments: Mapping[str, str],
        labels: Mapping[str, str],
        sources: Path | None = None,
    ) -> None:
        """Build *tag*, with the folder *sources* as the build context of that name."""
        print(f"building {tag}", file=sys.stderr)
        command = [self.command, "build", "--tag", tag, "--file", str(dockerfile)]
        if self.command == "podman":
            # OCI's format has no health checks; chroot needs no more of the kernel than root has.
            command += ["--format", "docker", "--isolation", "chroot", "--layers"]
        for name, value in ({"BUILD_BASE": BUILD_BASE} | dict(arguments)).items():
            command += ["--build-arg", f"{name}={value}"]
        # Not by the Dockerfile's arguments: podman's cache would keep the labels of other values.
        for name, value in labels.items():
            command += ["--label", f"org.opencontainers.image.{name}={value}"]
        if sources:
            command += ["--build-context", f"sources={sources}"]
        subprocess.run([*command, str(context)], check=True, stdout=sys.stderr)

    @contextlib.contextmanager
    def files(self, tag: str) -> Iterator[tarfile.TarFile]:
        """All files of the image *tag*, to be read once, in order."""
        container = run(self.command, "create", "--no-healthcheck", tag).strip()
        export = subprocess.Popen([self.command, "export", container], stdout=subprocess.PIPE)
        try:
            with export, tarfile.open(fileobj=export.stdout, mode="r|") as files:
                yield files
        finally:
            run(self.command, "rm", container)

    def user(self, tag: str) -> str:
        """As whom the image *tag* runs."""
        return run(self.command, "image", "inspect", "--format", "{{.Config.User}}", tag).strip()


def _debootstrap(root: Path) -> None:
    """A small Debian 12 in *root*, from where this machine has its packages."""
    if os.getuid() != 0 or not shutil.which("debootstrap"):
        raise BuildError("no registry can be reached, and debootstrap and root are not there")
    sources = _apt_sources()
    run("debootstrap", "--variant=minbase", "bookworm", str(root), sources["bookworm"])
    lines = [f"deb {uri} {release} main\n" for release, uri in sources.items()]
    (root / "etc/apt/sources.list").write_text("".join(lines))
    (root / "etc/apt/apt.conf.d/small").write_text(
        'Acquire::Languages "none";\nDir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\n'
        'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb || true"; };\n'
    )
    excluded = [f"path-exclude /{folder}/*\n" for folder in _UNUSED]
    (root / "etc/dpkg/dpkg.cfg.d/small").write_text("".join(excluded))
    run("chroot", str(root), "apt-get", "-qq", "update")
    run("chroot", str(root), "apt-get", "-qq", "-y", "upgrade")
    for folder in (*_UNUSED, "var/cache/apt", "var/lib/apt/lists", "var/log"):
        shutil.rmtree(root / folder)
        (root / folder).mkdir()
    (root / "etc/resolv.conf").unlink(missing_ok=True)


def _apt_sources() -> dict[str, str]:
    """Where this machine's apt finds the releases of Debian 12. Raises BuildError without them."""
    form = "$(ORIGIN) $(COMPONENT) $(RELEASE) $(REPO_URI)"
    targets = run("apt-get", "indextargets", "--format", form, "Created-By: Packages")
    sources = {
        release: uri
        for origin, component, release, uri in map(str.split, targets.splitlines())
        if (origin, component) == ("Debian", "main") and release.startswith("bookworm")
    }
    if "bookworm" not in sources:
        raise BuildError("no base: neither a registry answers, nor does apt here know Debian 12")
    return sources


def _works(*command: str) -> bool:
    """Is *command* there, and does it end well?"""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
