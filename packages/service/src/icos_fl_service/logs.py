"""Logs of every process: lines for people on a terminal, JSON otherwise."""

import logging
import sys
import threading

import structlog
from structlog.processors import ExceptionRenderer
from structlog.stdlib import ProcessorFormatter
from structlog.tracebacks import ExceptionDictTransformer

_uncaught = logging.getLogger("uncaught")


def configure(level: str = "INFO") -> None:
    """Set up structlog on standard error. The event is a constant phrase; facts are keys."""
    structlog.configure(
        processors=[*_facts(), *_rendering()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def configure_libraries(level: str = "WARNING") -> None:
    """The same for what libraries tell by Python's logging, for warnings, and for errors that
    nobody catches.

    For a process of our own, before their import: where the root logger is set up, nothing changes.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(library_formatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(capture=True)
    sys.excepthook = lambda *error: _uncaught.critical("ends by an error", exc_info=error)
    threading.excepthook = lambda thread: _uncaught.critical(
        "a thread ends by an error",
        exc_info=(thread.exc_type, thread.exc_value or thread.exc_type(), thread.exc_traceback),
    )


def library_formatter() -> logging.Formatter:
    """For handlers of libraries that will not do without their own."""
    return ProcessorFormatter(
        processors=[ProcessorFormatter.remove_processors_meta, *_rendering()],
        foreign_pre_chain=[structlog.stdlib.add_logger_name, *_facts()],
    )


def _facts() -> list[structlog.typing.Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _rendering() -> list[structlog.typing.Processor]:
    if sys.stderr.isatty():
        return [structlog.dev.ConsoleRenderer()]
    # Values of variables are no business of a log: there are tokens, and rows, among them.
    tracebacks = ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    return [tracebacks, structlog.processors.JSONRenderer()]
