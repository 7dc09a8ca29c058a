"""The server's copy of the global models in the store."""

import time
from collections.abc import Mapping
from typing import Any

import structlog
from icos_fl_timeseries_store import ModelVersion, StoreError, StoreSettings, connect

from icos_fl_server.checkpoints import Checkpoint

OWNER = "server"

log = structlog.get_logger()


class ModelStates:
    """Keeps versions under the owner ``server``; does nothing without a store.

    A store that is down costs its copy, not the run: it is logged once.
    """

    def __init__(self, store: StoreSettings | None, run_config: Mapping[str, Any]) -> None:
        self._store = store
        self._config = {k: v for k, v in run_config.items() if isinstance(v, str | int | float)}
        self._told = False

    def put(
        self, metric: str, checkpoint: Checkpoint, facts: Mapping[str, float | None], *, best: bool
    ) -> None:
        """Keep *checkpoint* with what the nodes said of it."""
        if self._store is None:
            return
        known = {key: value for key, value in facts.items() if value is not None}
        version = ModelVersion(
            round=checkpoint.round,
            weights=checkpoint.weights.named(),
            config=self._config,
            metadata={"created-unix-s": time.time(), **known},
        )
        try:
            with connect(self._store) as store:
                store.model_state(OWNER, metric).put(version, best=best)
        except StoreError as error:
            if not self._told:
                self._told = True
                log.warning("model state not kept", error=str(error))
