"""The logs of every service are set up by icos_fl_service."""

from icos_fl_service.logs import configure

__all__ = ["configure"]
