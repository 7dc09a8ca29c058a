"""Flower's lines, and uvicorn's, as those of every service."""

import logging
import sys
from importlib import import_module
from typing import Any

from flwr.supercore.logger import FLOWER_LOGGER, console_handler
from icos_fl_service import logs


def tell_in_json() -> None:
    """Have Flower's lines and uvicorn's be JSON, unless a person reads them on a terminal."""
    logs.configure()
    logs.configure_libraries()
    FLOWER_LOGGER.propagate = False  # it has a handler of its own
    if sys.stderr.isatty():
        return
    formatter = logs.library_formatter()
    # Its class formats by itself, whatever formatter it is given.
    console_handler.format = formatter.format  # type: ignore[method-assign]
    console_handler.addFilter(lambda record: bool(record.getMessage().strip()))
    config: Any = import_module("uvicorn").Config
    configure = config.configure_logging

    def configure_in_json(self: Any) -> None:
        configure(self)
        for name in ("uvicorn", "uvicorn.access", "uvicorn.error"):
            for handler in logging.getLogger(name).handlers:
                handler.setFormatter(formatter)

    config.configure_logging = configure_in_json
