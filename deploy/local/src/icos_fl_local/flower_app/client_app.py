"""Flower looks for a plain ``app`` in the app's own folder; the ClientApp itself is installed."""

from icos_fl_client.app import app as _app

app = _app
