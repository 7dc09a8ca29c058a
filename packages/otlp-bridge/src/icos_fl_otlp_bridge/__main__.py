"""``icos-fl-otlp-bridge``: receive OTLP metrics, store the configured ones."""

import signal
import sys

import structlog
from icos_fl_service import logs
from icos_fl_service.grpc_server import ListenError
from icos_fl_service.metrics import Metrics, MetricsAddressError
from icos_fl_service.security import Security, SecurityError, load_security
from icos_fl_service.settings import load_or_exit, refuse_arguments
from icos_fl_service.signals import Signals
from icos_fl_timeseries_store import connect

from icos_fl_otlp_bridge import metrics
from icos_fl_otlp_bridge.config import BridgeConfig, default_config, load_config
from icos_fl_otlp_bridge.errors import ConfigError
from icos_fl_otlp_bridge.server import Server
from icos_fl_otlp_bridge.settings import BridgeSettings

log = structlog.get_logger()


def main() -> None:
    """Read the settings and the files that they name, serve until SIGTERM or SIGINT.

    At SIGHUP the files are read again.
    """
    refuse_arguments(str(__doc__), "ICOS_FL_BRIDGE_")
    settings = load_or_exit(BridgeSettings)
    logs.configure(settings.log_level)
    logs.configure_libraries()
    signals = Signals(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
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
        served = Metrics(
            "icos-fl-otlp-bridge", settings.metrics_address, settings.metrics_otlp_endpoint
        )
    except (ConfigError, SecurityError, ListenError, MetricsAddressError) as error:
        sys.exit(f"icos-fl-otlp-bridge: {error}")
    server.start()
    log.info(
        "bridge serves",
        port=server.port,
        http_port=server.http_port,
        columns=list(config.all_columns),
    )
    while signals.wait() == signal.SIGHUP:
        _take_over(settings, server)
    server.stop()
    served.close()


def _read(settings: BridgeSettings) -> tuple[BridgeConfig, Security]:
    """What the files say. Raises ConfigError, SecurityError."""
    config = load_config(settings.config) if settings.config else default_config()
    return config, load_security(settings.tls, settings.tokens)


def _take_over(settings: BridgeSettings, server: Server) -> None:
    try:
        config, security = _read(settings)
    except (ConfigError, SecurityError) as error:
        metrics.CONFIG_TAKEN_OVER.labels("refused").inc()
        log.error("new configuration refused, the old one goes on", reason=str(error))
        return
    server.take_over(config, security)
    metrics.CONFIG_TAKEN_OVER.labels("taken_over").inc()
    log.info("new configuration taken over", columns=list(config.all_columns))


if __name__ == "__main__":
    main()
