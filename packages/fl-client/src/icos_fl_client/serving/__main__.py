"""``icos-fl-forecaster``: forecast until SIGTERM or SIGINT; SIGHUP renews certificates, tokens."""

import signal
import sys

import structlog
from icos_fl_service import logs, status
from icos_fl_service.grpc_server import ListenError
from icos_fl_service.metrics import Metrics, MetricsAddressError
from icos_fl_service.security import SecurityError, load_security, renew_until_stopped
from icos_fl_service.settings import load_or_exit, refuse_arguments
from icos_fl_service.signals import Signals
from icos_fl_timeseries_store import connect
from icos_fl_timeseries_store.conditions import ExpectationsError, load_expectations
from prometheus_client import REGISTRY

from icos_fl_client.errors import ConfigError
from icos_fl_client.processor_client import ProcessorClient
from icos_fl_client.serving.board import Board
from icos_fl_client.serving.follower import Follower, Following
from icos_fl_client.serving.kept import KeptState
from icos_fl_client.serving.metrics import BoardCollector
from icos_fl_client.serving.page import Page
from icos_fl_client.serving.server import Server
from icos_fl_client.serving.settings import ForecasterSettings

DISTRIBUTION = "icos-fl-client"
PROCESSOR_SECONDS = 5.0
"""The longest that a forecast waits for the processor."""


def main() -> None:
    """Exit status 0 when told to stop, 1 if it cannot listen, 2 for bad settings."""
    refuse_arguments(str(__doc__), "ICOS_FL_FORECASTER_")
    settings = load_or_exit(ForecasterSettings)
    logs.configure()
    logs.configure_libraries()
    signals = Signals(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    board = Board()
    try:
        follower = _follower(settings, board)
        server = Server(
            lambda: connect(settings.store),
            follower,
            board,
            settings.listen_address,
            watchers_max=settings.watchers_max,
            security=load_security(settings.tls, settings.tokens),
        )
        page = settings.page_address and Page(
            settings.page_address,
            board,
            follower,
            lambda: server.security,
            recorded=settings.recorded,
        )
        REGISTRY.register(BoardCollector(board.outlooks))
        metrics = Metrics(
            DISTRIBUTION,
            settings.metrics_address,
            settings.metrics_otlp_endpoint,
            lambda: status.of(DISTRIBUTION, "forecaster"),
        )
    except (
        ListenError,
        MetricsAddressError,
        ExpectationsError,
        SecurityError,
        ConfigError,
    ) as error:
        print(f"icos-fl-forecaster: {error}", file=sys.stderr)
        bad_settings = isinstance(error, ExpectationsError | ConfigError)
        raise SystemExit(2 if bad_settings else 1) from None
    server.start()
    log = structlog.get_logger()
    log.info(
        "serving",
        address=settings.listen_address,
        port=server.port,
        metrics_port=metrics.port,
        page_port=page.port if page else None,
    )
    renew_until_stopped(signals, settings, server.take_over)
    log.info("stopping")
    if page:
        page.close()
    server.stop()
    metrics.close()


def _follower(settings: ForecasterSettings, board: Board) -> Follower:
    """Raises ExpectationsError or ConfigError."""
    interval_ns = round(settings.interval_seconds * 1e9)
    following = Following(
        interval_ns=interval_ns,
        ahead_ns_h=tuple(
            round(seconds / settings.interval_seconds) * interval_ns
            for seconds in settings.horizons
        ),
        metrics=settings.metrics,
        expectations=load_expectations(settings.expectations),
        recorded=settings.recorded,
    )
    credentials = settings.processor.credentials()

    def processor() -> ProcessorClient:
        return ProcessorClient(
            settings.processor.address,
            PROCESSOR_SECONDS,
            wait_for_ready=False,
            credentials=credentials,
        )

    return Follower(
        following,
        board,
        KeptState(settings.state_folder),
        processor if settings.processor.address else None,
    )


if __name__ == "__main__":
    main()
