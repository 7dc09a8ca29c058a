"""``icos-fl-otlp-bridge``: receive OTLP metrics, store the configured ones."""

import signal
import socket
import sys

import structlog
from icos_fl_timeseries_store import connect, logs
from icos_fl_timeseries_store.settings import load_or_exit

from icos_fl_otlp_bridge import metrics
from icos_fl_otlp_bridge.config import BridgeConfig, default_config, load_config
from icos_fl_otlp_bridge.errors import ConfigError, ListenError
from icos_fl_otlp_bridge.security import Security, load_security
from icos_fl_otlp_bridge.server import Server
from icos_fl_otlp_bridge.settings import BridgeSettings

ENDING = (signal.SIGTERM, signal.SIGINT)

log = structlog.get_logger()


def main() -> None:
    """Read the settings and the files that they name, serve until SIGTERM or SIGINT.

    At SIGHUP the files are read again.
    """
    settings = load_or_exit(BridgeSettings)
    logs.configure(settings.log_level)
    signals = _signals()
    try:
        config, security = _read(settings)
        server = Server(
            config,
            lambda: connect(settings.store),
            settings.listen_address,
            settings.max_message_bytes,
            settings.max_concurrent_exports,
            http_listen_address=settings.http_listen_address,
            security=security,
        )
    except (ConfigError, ListenError) as error:
        sys.exit(f"icos-fl-otlp-bridge: {error}")
    server.start()
    log.info(
        "bridge serves", port=server.port, http_port=server.http_port, columns=list(config.columns)
    )
    while (number := signals.recv(1)[0]) not in ENDING:
        if number == signal.SIGHUP:
            _take_over(settings, server)
    server.stop()


def _signals() -> socket.socket:
    """Gives the number of each signal as a byte.

    Whichever thread the kernel chooses for a signal writes it; a main thread that waits for a lock
    would not notice.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.detach())
    for number in (*ENDING, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reading


def _read(settings: BridgeSettings) -> tuple[BridgeConfig, Security]:
    """What the files say. Raises ConfigError."""
    config = load_config(settings.config) if settings.config else default_config()
    return config, load_security(settings.tls, settings.tokens)


def _take_over(settings: BridgeSettings, server: Server) -> None:
    try:
        config, security = _read(settings)
    except ConfigError as error:
        metrics.CONFIG_TAKEN_OVER.labels("refused").inc()
        log.error("new configuration refused, the old one goes on", reason=str(error))
        return
    server.take_over(config, security)
    metrics.CONFIG_TAKEN_OVER.labels("taken_over").inc()
    log.info("new configuration taken over", columns=list(config.columns))


if __name__ == "__main__":
    main()
