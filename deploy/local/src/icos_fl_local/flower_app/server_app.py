"""Flower looks for a plain ``app`` in the app's own folder; the ServerApp itself is installed."""

from icos_fl_server.app import app as _app

app = _app
