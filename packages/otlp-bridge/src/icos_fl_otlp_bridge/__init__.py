"""Receives OTLP metrics and stores the configured ones as rows of each node's window."""

from icos_fl_service.grpc_server import ListenError

from icos_fl_otlp_bridge.config import BridgeConfig, default_config, load_config
from icos_fl_otlp_bridge.errors import ConfigError
from icos_fl_otlp_bridge.server import Server

__all__ = [
    "BridgeConfig",
    "ConfigError",
    "ListenError",
    "Server",
    "default_config",
    "load_config",
]
