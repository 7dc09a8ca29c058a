"""The store on dataClay: windows and model states as objects of its backend, found by alias."""

import asyncio
import contextlib
import io
import logging
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar
from uuid import UUID

_plain_root = not logging.getLogger().handlers
# dataClay's settings look for secrets in a folder that only containers have.
warnings.filterwarnings("ignore", message='directory "/run/secrets" does not exist')
from dataclay import Client, DataClayObject  # noqa: E402 - its import sets up the root logger, see below
from dataclay.config import get_runtime, session_var  # noqa: E402
from dataclay.event_loop import get_dc_event_loop  # noqa: E402
from dataclay.exceptions import (  # noqa: E402
    AliasAlreadyExistError,
    AliasDoesNotExistError,
    AlreadyExistError,
    DataClayException,
    DoesNotExistError,
    ObjectNotFound,
)
from grpc import RpcError  # noqa: E402

from icos_fl_timeseries_store import model  # noqa: E402
from icos_fl_timeseries_store.contract import (  # noqa: E402
    DEFAULT_CAPACITY_ROWS,
    Appended,
    ModelState,
    ModelVersion,
    Rows,
    Times,
    Values,
    Window,
    WindowInfo,
)
from icos_fl_timeseries_store.errors import StoreUnavailable, UnknownNode  # noqa: E402
from icos_fl_timeseries_store.names import checked_name  # noqa: E402
from icos_fl_timeseries_store.settings import StoreSettings  # noqa: E402

if _plain_root:  # dataClay tells every call at INFO, to whoever imports it
    logging.getLogger().setLevel(logging.WARNING)
logging.getLogger("dataclay").setLevel(logging.ERROR)

T = TypeVar("T")
_log = logging.getLogger(__name__)
_WINDOW: Final = "window."
_MODEL: Final = "model."
_DATASET: Final = "admin"
# By type, not by text: gRPC says "not found" of a host too, whose objects may be safe on its disk.
_MISSING = (AliasDoesNotExistError, DoesNotExistError, ObjectNotFound)
_TAKEN = (AliasAlreadyExistError, AlreadyExistError)


class _Connection:
    """The process's one dataClay client, shared by its stores: dataClay keeps it in a global."""

    _lock = threading.Lock()
    _current: "_Connection | None" = None

    def __init__(self, host: str, port: int) -> None:
        self.address = (host, port)
        self.users = 0
        self._client = Client(host=host, port=port)
        # dataClay prints that it starts a thread, into what may be a command's own result.
        with contextlib.redirect_stdout(io.StringIO()):
            self._client.start()
        self._session = session_var.get()

    @classmethod
    def take(cls, host: str, port: int) -> "_Connection":
        with cls._lock:
            if cls._current is None:
                cls._current = cls(host, port)
            elif cls._current.address != (host, port):
                raise StoreUnavailable(
                    f"this process uses the store at {cls._current.address[0]}:"
                    f"{cls._current.address[1]}; dataClay allows one, not {host}:{port} too"
                )
            cls._current.users += 1
            return cls._current

    def give_back(self) -> None:
        with self._lock:
            self.users -= 1
            if self.users == 0:
                self._client.stop()
                type(self)._current = None

    def call(self, coroutine: Coroutine[Any, Any, T], timeout_seconds: float) -> T:
        """Run *coroutine* on dataClay's loop; whatever says 'not now' becomes StoreUnavailable."""
        # dataClay looks for its session in a context variable; only the connecting thread has it.
        session_var.set(self._session)
        future = asyncio.run_coroutine_threadsafe(coroutine, get_dc_event_loop())
        where = f"the store at {self.address[0]}:{self.address[1]}"
        try:
            return future.result(timeout_seconds)
        except TimeoutError:
            future.cancel()
            self._reconnect()
            raise StoreUnavailable(f"{where} did not answer in {timeout_seconds:g} s") from None
        except (*_MISSING, *_TAKEN):
            raise
        except (DataClayException, RpcError, RuntimeError, OSError) as error:
            self._reconnect()
            raise StoreUnavailable(f"{where}: {_one_line(error)}") from None

    @staticmethod
    def _reconnect() -> None:
        """Let the next call open a new channel to the backend.

        gRPC waits longer and longer, up to two minutes, before it tries a failed channel again: a
        backend that is back would be missed for that long.
        """
        get_dc_event_loop().call_soon_threadsafe(get_runtime().backend_clients.clear)


def _one_line(error: BaseException) -> str:
    details = error.details() if isinstance(error, RpcError) else str(error)
    return " ".join(str(details or type(error).__name__).split())[:300]


class DataClayStore:
    """A Store in the backend of the dataClay at *settings*."""

    def __init__(self, settings: StoreSettings) -> None:
        self.timeout_seconds = settings.timeout_seconds
        self._connection = _Connection.take(settings.host, settings.port)
        self._closed = False

    def call(self, coroutine: Coroutine[Any, Any, T], extra_seconds: float = 0.0) -> T:
        return self._connection.call(coroutine, self.timeout_seconds + extra_seconds)

    def nodes(self) -> list[str]:
        aliases = self.call(get_runtime().metadata_service.get_all_alias(_DATASET, None))
        names = (alias.name for alias in aliases.values())
        return sorted(name.removeprefix(_WINDOW) for name in names if name.startswith(_WINDOW))

    def create_window(self, node: str, capacity_rows: int = DEFAULT_CAPACITY_ROWS) -> Window:
        window = DataClayWindow(self, node, lambda: model.TimeSeriesData(capacity_rows))
        window.resize(capacity_rows)
        return window

    def window(self, node: str) -> Window:
        window = DataClayWindow(self, node, None)
        window.info()
        return window

    def model_state(self, owner: str, metric: str) -> ModelState:
        return DataClayModelState(self, f"{owner}.{metric}")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._connection.give_back()

    def __enter__(self) -> "DataClayStore":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Stored:
    """An object of the backend, found by its alias and found again when it is gone.

    A backend that was killed comes back without the objects that it had not written, while their
    aliases are still there; a client that was killed may leave an alias before its object. Who may
    make such an object makes it anew; a reader alone reports it missing.
    """

    def __init__(self, store: DataClayStore, alias: str, make: Callable[[], Any] | None) -> None:
        self._store = store
        self._alias = alias
        self._make = make
        self._object: Any = None

    def call(self, method: str, *args: Any, extra_seconds: float = 0.0) -> Any:
        """Call an active method; once more where the object turns out to be another or gone."""
        try:
            return self._try(method, *args, extra_seconds=extra_seconds)
        except _MISSING:
            gone, self._object = self._object, None
            if gone is None:
                raise
            if self._make is not None:
                self._forget(gone._dc_meta.id)
        return self._try(method, *args, extra_seconds=extra_seconds)

    def _try(self, method: str, *args: Any, extra_seconds: float) -> Any:
        if self._object is None:
            self._object = self._find()
        return self._store.call(getattr(self._object, method)(*args), extra_seconds)

    def _find(self) -> Any:
        target = None
        patience = time.monotonic() + self._store.timeout_seconds / 2
        while True:
            try:
                return self._store.call(DataClayObject.a_get_by_alias(self._alias))
            except _MISSING:
                if self._make is None:
                    raise
            if time.monotonic() > patience and target is not None:
                self._forget(target)
            try:
                made = self._make()
                self._store.call(made.a_make_persistent(alias=self._alias))
                return made
            except _TAKEN:
                # Another process was faster: its alias comes an instant before its object.
                target = target or self._target()
                time.sleep(0.05)

    def _target(self) -> UUID | None:
        """Which object the alias names, be it there or not."""
        aliases = self._store.call(get_runtime().metadata_service.get_all_alias(_DATASET, None))
        ids = (alias.object_id for alias in aliases.values() if alias.name == self._alias)
        return next(ids, None)

    def _forget(self, gone: UUID) -> None:
        """Delete the alias of the object *gone*, unless another has made a new one meanwhile."""
        if self._target() != gone:
            return
        _log.warning("%s is gone from the backend; it is made anew, empty", self._alias)
        with contextlib.suppress(*_MISSING):
            self._store.call(get_runtime().metadata_service.delete_alias(self._alias, _DATASET))


class DataClayWindow:
    """A Window whose rows are in the backend."""

    def __init__(self, store: DataClayStore, node: str, make: Callable[[], Any] | None) -> None:
        self._store = store
        self._node = node
        self._stored = _Stored(store, _WINDOW + checked_name(node), make)

    def _call(self, method: str, *args: Any, extra_seconds: float = 0.0) -> Any:
        try:
            return self._stored.call(method, *args, extra_seconds=extra_seconds)
        except _MISSING:
            others = [node for node in self._store.nodes() if node != self._node]
            raise UnknownNode(self._node, others) from None

    def append(
        self,
        columns: Sequence[str],
        times_ns_t: Times,
        values_tf: Values,
        units: Mapping[str, str] | None = None,
    ) -> Appended:
        appended: Appended = self._call(
            "append", tuple(columns), times_ns_t, values_tf, dict(units or {})
        )
        return appended

    def read(self, *, last: int | None = None, after: int | None = None) -> Rows:
        rows: Rows = self._call("read", last, after)
        return rows

    def info(self) -> WindowInfo:
        info: WindowInfo = self._call("info")
        return info

    def resize(self, capacity_rows: int) -> None:
        self._call("resize", capacity_rows)

    def wait(self, after: int, timeout_seconds: float) -> int:
        cursor: int = self._call("wait", after, timeout_seconds, extra_seconds=timeout_seconds)
        return cursor


class DataClayModelState:
    """A ModelState in the backend."""

    def __init__(self, store: DataClayStore, name: str) -> None:
        self._stored = _Stored(store, _MODEL + checked_name(name), model.ModelState)

    def put(self, version: ModelVersion, *, best: bool = False) -> None:
        self._stored.call("put", version, best)

    def get(self, which: Literal["latest", "best"] = "latest") -> ModelVersion | None:
        version: ModelVersion | None = self._stored.call("get", which)
        return version


def connect(settings: StoreSettings) -> DataClayStore:
    """The store at *settings*. Raises StoreUnavailable if it does not answer."""
    store = DataClayStore(settings)
    try:
        store.nodes()
    except BaseException:
        store.close()
        raise
    return store
