"""``icos-fl-processor``: serve until SIGTERM or SIGINT; SIGHUP renews certificates and tokens."""

import signal
import sys

import structlog
from icos_fl_service import logs
from icos_fl_service.metrics import Metrics, MetricsAddressError
from icos_fl_service.security import SecurityError, load_security, renew_until_stopped
from icos_fl_service.settings import load_or_exit, refuse_arguments
from icos_fl_service.signals import Signals
from icos_fl_timeseries_store import connect
from icos_fl_timeseries_store.conditions import ExpectationsError, load_expectations

from icos_fl_processor.server import ListenError, Server
from icos_fl_processor.settings import ProcessorSettings


def main() -> None:
    """Exit status 0 when told to stop, 1 if it cannot listen, 2 for bad settings."""
    refuse_arguments(str(__doc__), "ICOS_FL_PROCESSOR_")
    settings = load_or_exit(ProcessorSettings)
    logs.configure()
    logs.configure_libraries()
    signals = Signals(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    try:
        server = Server(
            lambda: connect(settings.store),
            settings.listen_address,
            settings.max_message_bytes,
            settings.watchers_max,
            load_expectations(settings.expectations),
            judging=settings.has_metrics,
            recorded=settings.recorded,
            security=load_security(settings.tls, settings.tokens),
        )
        metrics = Metrics(
            "icos-fl-processor", settings.metrics_address, settings.metrics_otlp_endpoint
        )
    except (ListenError, MetricsAddressError, ExpectationsError, SecurityError) as error:
        print(f"icos-fl-processor: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ExpectationsError) else 1) from None
    server.start()
    log = structlog.get_logger()
    log.info(
        "serving", address=settings.listen_address, port=server.port, metrics_port=metrics.port
    )
    renew_until_stopped(signals, settings, server.take_over)
    log.info("stopping")
    server.stop()
    metrics.close()


if __name__ == "__main__":
    main()
