"""Flower's processes, with tasks forked from a warm worker and requests held until they have an
answer."""

from icos_fl_warm_runtime.pace import Pace
from icos_fl_warm_runtime.worker import TASK_REGISTRY, kept_folder

__all__ = ["TASK_REGISTRY", "Pace", "kept_folder"]
