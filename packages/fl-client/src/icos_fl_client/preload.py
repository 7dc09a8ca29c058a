"""What a task would import only when it first needs it: a warm worker has it before it forks.

A module that is private to its package may go away in a later version. Then tasks import again what
took its place, which costs them milliseconds; a test says so.
"""

import contextlib
import importlib

MODULES = (
    "icos_fl_timeseries_store.dataclay_store",
    "grpc._channel",
    "torch.nested._internal.nested_tensor",
)

for name in MODULES:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
