"""The commands: Flower's own, warm unless ICOS_FL_RUNTIME says ``stock``."""

import os
import sys
from importlib import import_module
from logging import WARNING

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


def superexec() -> None:
    """``flower-superexec``, with its options."""
    _run("superexec")


def main() -> None:
    """``python -m icos_fl_warm_runtime COMMAND …``."""
    if len(sys.argv) < 2 or sys.argv[1] not in _COMMANDS:
        raise SystemExit(f"usage: python -m icos_fl_warm_runtime {'|'.join(_COMMANDS)} …")
    _run(sys.argv.pop(1))


def _run(name: str) -> None:
    runtime = os.environ.get(RUNTIME, "warm")
    if runtime not in ("warm", "stock"):
        raise SystemExit(f"{RUNTIME}={runtime!r}: neither 'warm' nor 'stock'")
    sys.argv[0] = f"flower-{name}"  # what Flower calls itself in its messages
    # Processes are forked from this one, which may have no second thread then: numpy makes some.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if runtime == "warm":
        from flwr.supercore import log

        from icos_fl_warm_runtime import flower

        if changed := flower.changed(flower.NAMES[name]):
            log(
                WARNING,
                "This Flower is not the one that the warm runtime was written for; taking the "
                "stock path. Changed: %s",
                ", ".join(changed),
            )
        else:
            flower.warm(name, superexec)
    module, function = _COMMANDS[name]
    getattr(import_module(module), function)()


if __name__ == "__main__":
    main()
