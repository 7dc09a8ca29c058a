"""The commands: Flower's own, warm unless ICOS_FL_RUNTIME says ``stock``."""

import os
import sys
from functools import partial
from importlib import import_module
from logging import INFO, WARNING

RUNTIME = "ICOS_FL_RUNTIME"
_COMMANDS = {
    "superlink": ("flwr.superlink.cli.flower_superlink", "flower_superlink"),
    "supernode": ("flwr.supernode.cli.flower_supernode", "flower_supernode"),
    "superexec": ("flwr.supercore.cli.flower_superexec", "flower_superexec"),
}


def superlink() -> None:
    """``flower-superlink``, with its options."""
    _run("superlink")


def supernode() -> None:
    """``flower-supernode``, with its options."""
    _run("supernode")


def superexec(host: str = "") -> None:
    """``flower-superexec``, with its options; *host* is what has started it, if that is ours."""
    _run("superexec", host)


def main() -> None:
    """``python -m icos_fl_warm_runtime COMMAND …``."""
    if len(sys.argv) < 2 or sys.argv[1] not in _COMMANDS:
        raise SystemExit(f"usage: python -m icos_fl_warm_runtime {'|'.join(_COMMANDS)} …")
    _run(sys.argv.pop(1))


def _run(name: str, host: str = "") -> None:
    runtime = os.environ.get(RUNTIME, "warm")
    if runtime not in ("warm", "stock"):
        raise SystemExit(f"{RUNTIME}={runtime!r}: neither 'warm' nor 'stock'")
    sys.argv[0] = f"flower-{name}"  # what Flower calls itself in its messages
    # Processes are forked from this one, which may have no second thread then: numpy makes some.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    from flwr.supercore import log

    from icos_fl_warm_runtime.flower.hosts import starts_superexec
    from icos_fl_warm_runtime.flower.logs import tell_in_json
    from icos_fl_warm_runtime.flower.names import NAMES, changed

    tell_in_json()
    found = changed(NAMES[name]) if runtime == "warm" else []
    if found:
        log(
            WARNING,
            "This Flower is not the one that the warm runtime was written for; taking the "
            "stock path. Changed: %s",
            ", ".join(found),
        )
    is_warm = runtime == "warm" and not found
    # A warm SuperExec serves them for its host too: the tasks are its own.
    _tell_prometheus(name, host, elsewhere=is_warm and starts_superexec(name))
    if is_warm:
        _warm(name)
    module, function = _COMMANDS[name]
    getattr(import_module(module), function)()


def _tell_prometheus(name: str, host: str, *, elsewhere: bool) -> None:
    """Serve metrics until the process ends; if that is done *elsewhere*, check that it can be.

    The status of a SuperExec that its *host* has started is that of the host.
    """
    from flwr.supercore import log
    from icos_fl_service.metrics import Metrics, MetricsAddressError, check
    from icos_fl_service.settings import load_or_exit

    from icos_fl_warm_runtime.flower.status import status_of, status_of_host
    from icos_fl_warm_runtime.metrics import RuntimeSettings

    status = partial(status_of_host, host) if host else partial(status_of, name)
    settings = load_or_exit(RuntimeSettings)
    where = settings.metrics_address, settings.metrics_otlp_endpoint
    try:
        if elsewhere:
            check(*where)
        elif port := Metrics("icos-fl-warm-runtime", *where, status).port:
            log(INFO, "Serving metrics on port %d", port)
    except MetricsAddressError as error:
        sys.exit(f"flower-{name}: {error}")


def _warm(name: str) -> None:
    from icos_fl_warm_runtime.flower import hosts

    if name == "superexec":
        from icos_fl_warm_runtime.executor import ForkExecutor

        hosts.warm_superexec(ForkExecutor)
        return
    from icos_fl_warm_runtime.superexec import starter

    ours = partial(starter, partial(superexec, name)) if hosts.starts_superexec(name) else None
    if name == "superlink":
        hosts.warm_superlink(ours)
    else:
        hosts.warm_supernode(ours)


if __name__ == "__main__":
    main()
