"""What dataClay's key-value store must know of a backend and its objects, kept true.

The state folder is the truth. A backend that was killed leaves a registration with which it could
not register again; a key-value store that lost its state, or the last second of it, lacks aliases
of windows that are there. Both are put right at the start, and while the backend runs.
"""

import json
import logging
import pickle
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import valkey
from dataclay.metadata.kvdata import Alias, Backend, Dataclay, ObjectMetadata

from icos_fl_timeseries_store import codec
from icos_fl_timeseries_store.durable import StateFolder
from icos_fl_timeseries_store.journal import Journal, sync_folder
from icos_fl_timeseries_store.names import MODEL, WINDOW, object_id

LOOK_SECONDS: Final = 2.0
"""How often the backend looks whether the key-value store still knows it."""
_DATASET: Final = "admin"
_CLASSES: Final = {
    WINDOW: "icos_fl_timeseries_store.model.TimeSeriesData",
    MODEL: "icos_fl_timeseries_store.model.ModelState",
}

_log = logging.getLogger(__name__)


class Registrations:
    """Of the backend whose state is in *folder*, and of all that it holds."""

    def __init__(self, kv: valkey.Valkey, folder: Path, host: str, port: int) -> None:
        self._kv = kv
        self._folder = folder
        self._state = StateFolder(folder)
        self._address = (host, port)
        self._backend_id = _identity(folder)
        self._remembered: dict[str, Any] = {}
        self._ended = threading.Event()
        self._keeping = threading.Thread(target=self._keep, name="registrations", daemon=True)

    def begin(self) -> None:
        """Before dataClay's backend starts. Raises ValkeyError, OSError."""
        for key, value in _with_prefix(self._kv, Backend.path):
            # It is this backend's, or of one that had the address that we are about to listen on.
            if (
                UUID(value["id"]) == self._backend_id
                or (value["host"], value["port"]) == self._address
            ):
                self._kv.delete(key)
                # The metadata service keeps a list of its own, and tells clients of it.
                self._kv.publish("del-backend-client", value["id"])
        adopt(self._kv, self._folder, self._state)
        if wanted := dict(self._objects()):
            self._kv.mset(wanted)
        self._remember_dataclay()
        self._keeping.start()

    def registered(self, identity: UUID, host: str, port: int, dataclay_id: UUID) -> None:
        """After dataClay's backend has made its own: not earlier is it put back."""
        mine = Backend(id=identity, host=host, port=port, dataclay_id=dataclay_id)
        self._remembered[mine.key] = mine.value

    def end(self) -> None:
        """Before dataClay's backend withdraws its own."""
        self._ended.set()
        self._keeping.join(LOOK_SECONDS)

    def _objects(self) -> Iterator[tuple[str, str]]:
        """Keys and values of aliases and objects for every file."""
        for alias in self._state.aliases():
            number = object_id(alias)
            of_alias = Alias(name=alias, dataset_name=_DATASET, object_id=number)
            metadata = ObjectMetadata(
                id=number,
                dataset_name=_DATASET,
                class_name=_CLASSES[WINDOW if alias.startswith(WINDOW) else MODEL],
                master_backend_id=self._backend_id,
            )
            yield metadata.key, metadata.value
            yield of_alias.key, of_alias.value

    def _keep(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            try:
                self._remember_dataclay()
                self._put_back({**dict(self._objects()), **self._remembered})
            except (valkey.ValkeyError, OSError) as error:
                _log.info("key-value store not seen to: reason=%s", error)

    def _remember_dataclay(self) -> None:
        """The metadata service makes this when it first starts; without it no backend starts."""
        key = f"{Dataclay.path}this"
        value: Any = self._kv.get(key)
        if value is not None:
            self._remembered[key] = value

    def _put_back(self, wanted: Mapping[str, Any]) -> None:
        keys = list(wanted)
        there: Any = self._kv.mget(keys) if keys else []
        missing = {
            key: wanted[key] for key, value in zip(keys, there, strict=True) if value is None
        }
        if missing and not self._ended.is_set():
            _log.warning("registrations put back: count=%d", len(missing))
            self._kv.mset(missing)


def _with_prefix(kv: valkey.Valkey, prefix: str) -> Iterator[tuple[bytes, Any]]:
    for key in list(kv.scan_iter(f"{prefix}*")):
        value: Any = kv.get(key)
        if value is not None:
            yield key, json.loads(value)


def _identity(folder: Path) -> UUID:
    """The backend's id, as dataClay keeps it; a kill while it was written may have left no id."""
    path = folder / "BACKEND_ID"
    try:
        return UUID(path.read_text().strip())
    except (OSError, ValueError):
        identity = uuid4()
    aside = folder / "BACKEND_ID.new"
    aside.write_text(str(identity))
    aside.rename(path)
    sync_folder(folder)
    return identity


def adopt(kv: valkey.Valkey, folder: Path, state: StateFolder) -> None:
    """Have aliases that fit the files, whatever a kill or an earlier version left.

    Before windows had files, dataClay pickled each object when it stopped: those are taken over.
    Raises ValkeyError, OSError.
    """
    for key, value in _with_prefix(kv, f"{Alias.path}{_DATASET}/"):
        alias, number = value["name"], UUID(value["object_id"])
        if not alias.startswith((WINDOW, MODEL)):
            continue
        if number != object_id(alias):
            _take_over(folder / str(number), state.path(alias))
        if number != object_id(alias) or not state.path(alias).exists():
            kv.delete(key, f"{ObjectMetadata.path}{number}")


def _take_over(pickled: Path, path: Path) -> None:
    try:
        if pickled.exists() and not path.exists():
            journal = Journal.beside(path, _parts_of(pickled))
            journal.take_place()
            journal.close()
    except OSError:
        raise  # as of a full disk: it is not the object's fault
    except Exception:
        _log.exception("object of an earlier version cannot be read: file=%s", pickled)
        pickled.rename(pickled.with_name(f"{pickled.name}.damaged"))
    pickled.unlink(missing_ok=True)


def _parts_of(pickled: Path) -> Any:
    with pickled.open("rb") as file:
        _metadata, properties, _state = pickle.load(file)  # noqa: S301 - our own, as dataClay does
    if "_dc_property_rows" in properties:
        return codec.window_to_parts(properties["_dc_property_rows"].snapshot())
    return codec.models_to_parts(properties["_dc_property_versions"])
