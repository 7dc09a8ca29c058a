"""``icos-fl-otlp-bridge``: receive OTLP metrics, store the configured ones."""

import signal
import sys
import threading

import structlog
from icos_fl_timeseries_store import connect, logs
from icos_fl_timeseries_store.settings import load_or_exit

from icos_fl_otlp_bridge.config import default_config, load_config
from icos_fl_otlp_bridge.errors import ConfigError, ListenError
from icos_fl_otlp_bridge.server import Server
from icos_fl_otlp_bridge.settings import BridgeSettings


def main() -> None:
    """Read the settings and the configuration, serve until SIGTERM or SIGINT."""
    settings = load_or_exit(BridgeSettings)
    logs.configure(settings.log_level)
    stopping = threading.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: stopping.set())
    try:
        config = load_config(settings.config) if settings.config else default_config()
        server = Server(
            config,
            lambda: connect(settings.store),
            settings.listen_address,
            settings.max_message_bytes,
            settings.max_concurrent_exports,
        )
    except (ConfigError, ListenError) as error:
        sys.exit(f"icos-fl-otlp-bridge: {error}")
    server.start()
    structlog.get_logger().info("bridge serves", port=server.port, columns=list(config.columns))
    stopping.wait()
    server.stop()


if __name__ == "__main__":
    main()
