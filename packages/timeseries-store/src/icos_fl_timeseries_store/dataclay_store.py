"""The store on dataClay: windows and model states as objects of its backend, found by alias."""

import asyncio
import concurrent.futures
import contextlib
import io
import logging
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal, TypeVar

_plain_root = not logging.getLogger().handlers
# dataClay's settings look for secrets in a folder that only containers have.
warnings.filterwarnings("ignore", message='directory "/run/secrets" does not exist')
from dataclay import Client, DataClayObject  # noqa: E402 - its import sets up the root logger, see below
from dataclay.backend.client import BackendClient  # noqa: E402
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
from dataclay.metadata.client import MetadataClient  # noqa: E402
from dataclay.proto.backend.backend_pb2_grpc import BackendServiceStub  # noqa: E402
from dataclay.proto.metadata.metadata_pb2_grpc import MetadataServiceStub  # noqa: E402
from grpc import ChannelConnectivity, RpcError  # noqa: E402
from grpc.aio import insecure_channel  # noqa: E402

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
from icos_fl_timeseries_store.names import MODEL, WINDOW, checked_name  # noqa: E402
from icos_fl_timeseries_store.settings import StoreSettings  # noqa: E402

if _plain_root:  # dataClay tells every call at INFO, to whoever imports it
    logging.getLogger().setLevel(logging.WARNING)
logging.getLogger("dataclay").setLevel(logging.ERROR)

_BROKEN = (ChannelConnectivity.TRANSIENT_FAILURE, ChannelConnectivity.SHUTDOWN)
T = TypeVar("T")
_log = logging.getLogger(__name__)
_DATASET: Final = "admin"
# What dataClay raises of a service that is away, or has just come back: it does not wrap all of it.
_AWAY = (
    DataClayException,
    RpcError,
    RuntimeError,
    OSError,
    KeyError,
    concurrent.futures.CancelledError,
)
# By type, not by text: gRPC says "not found" of a host too, whose objects may be safe on its disk.
_MISSING = (AliasDoesNotExistError, DoesNotExistError, ObjectNotFound)
_TAKEN = (AliasAlreadyExistError, AlreadyExistError)


def _say_at_once_that_a_backend_is_away() -> None:
    """dataClay calls a backend that it cannot reach again and again, without a pause.

    That takes half a processor in this process and in the metadata service, until the deadline.
    """
    call = BackendClient.call_active_method

    async def call_once(self: BackendClient, *args: Any, **kwargs: Any) -> Any:
        try:
            return await call(self, *args, **kwargs)
        except DataClayException as error:
            if "failed to connect" in str(error):  # what dataClay goes by
                raise ConnectionError(str(error)) from None
            raise

    BackendClient.call_active_method = call_once


def _try_anew_with_each_channel(client: type[Any], stub: type[Any]) -> None:
    """gRPC shares a connection that failed among channels, as long as one of them is not collected.

    And waits longer and longer, up to two minutes, before it tries it again: a service that is back
    would be missed for that long.
    """
    make = client.__init__
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
    ]

    def make_with_own_connection(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.channel = insecure_channel(self.address, options)
        self.stub = stub(self.channel)

    client.__init__ = make_with_own_connection


_say_at_once_that_a_backend_is_away()
_try_anew_with_each_channel(BackendClient, BackendServiceStub)
_try_anew_with_each_channel(MetadataClient, MetadataServiceStub)


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
        get_dc_event_loop().call_soon_threadsafe(self._ask_for_backends_when_needed)

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

    def call(
        self,
        coroutine: Coroutine[Any, Any, T],
        left: float,
        timeout_seconds: float,
        *,
        of_backend: bool,
    ) -> T:
        """Run *coroutine* on dataClay's loop; whatever says 'not now' becomes StoreUnavailable.

        It has the seconds that are *left* of a call's *timeout_seconds*.
        """
        # dataClay looks for its session in a context variable; only the connecting thread has it.
        session_var.set(self._session)
        future = asyncio.run_coroutine_threadsafe(coroutine, get_dc_event_loop())
        where = f"the store at {self.address[0]}:{self.address[1]}"
        try:
            return future.result(max(0.0, left))
        except TimeoutError:
            future.cancel()
            self._reconnect(of_backend)
            raise StoreUnavailable(f"{where} did not answer in {timeout_seconds:g} s") from None
        except (*_MISSING, *_TAKEN):
            raise
        except _AWAY as error:
            self._reconnect(of_backend)
            raise StoreUnavailable(f"{where}: {_one_line(error)}") from None

    def _ask_for_backends_when_needed(self) -> None:
        """And not every 10 s for the list that the metadata service has in memory.

        It hears of no change any more once the key-value store has been started again.
        """
        backends = self._client.runtime.backend_clients
        backends.stop_update_loop()
        backends.clear()

    def _reconnect(self, of_backend: bool) -> None:
        """Let the next call open new channels.

        Where the metadata service alone did not answer, backends are not forgotten: else no call
        would find them while it is away.
        """
        get_dc_event_loop().call_soon_threadsafe(self._forget_channels, of_backend)

    def _forget_channels(self, of_backend: bool) -> None:
        runtime = self._client.runtime
        if of_backend:
            runtime.backend_clients.clear()
        if runtime.metadata_service.channel.get_state() in _BROKEN:
            runtime.metadata_service = MetadataClient(*self.address)
            runtime.backend_clients.metadata_api = runtime.metadata_service


def _one_line(error: BaseException) -> str:
    details = error.details() if isinstance(error, RpcError) else str(error)
    return " ".join(str(details or type(error).__name__).split())[:300]


class DataClayStore:
    """A Store in the backend of the dataClay at *settings*."""

    def __init__(self, settings: StoreSettings) -> None:
        self.timeout_seconds = settings.timeout_seconds
        self._connection = _Connection.take(settings.host, settings.port)
        self._closed = False

    def deadline(self) -> float:
        """When a call that begins now must have ended, by ``time.monotonic``."""
        return time.monotonic() + self.timeout_seconds

    def call(
        self,
        coroutine: Coroutine[Any, Any, T],
        deadline: float | None = None,
        *,
        of_backend: bool = True,
    ) -> T:
        """What *coroutine* returns until *deadline*, by default a call's.

        Not *of_backend*: it asks the metadata service alone.
        """
        left = (self.deadline() if deadline is None else deadline) - time.monotonic()
        return self._connection.call(coroutine, left, self.timeout_seconds, of_backend=of_backend)

    def check(self) -> None:
        deadline, backends = self.deadline(), get_runtime().backend_clients
        self.call(backends.update(), deadline, of_backend=False)
        if not backends:
            raise StoreUnavailable("no backend has registered with the store")
        self.call(_ask(list(backends.values())), deadline)

    def aliases(self, deadline: float | None = None) -> list[Any]:
        """All that the metadata service knows."""
        asked = get_runtime().metadata_service.get_all_alias(_DATASET, None)
        return list(self.call(asked, deadline, of_backend=False).values())

    def nodes(self, deadline: float | None = None) -> list[str]:
        names = (alias.name for alias in self.aliases(deadline))
        return sorted(name.removeprefix(WINDOW) for name in names if name.startswith(WINDOW))

    def create_window(self, node: str, capacity_rows: int = DEFAULT_CAPACITY_ROWS) -> Window:
        window = DataClayWindow(self, node, capacity_rows)
        window.resize(capacity_rows)
        return window

    def window(self, node: str) -> Window:
        window = DataClayWindow(self, node, None)
        window.info()
        return window

    def repair(self, node: str) -> str:
        """Set aside what is damaged of *node*'s window, keep what is intact; says what was done."""
        return DataClayWindow(self, node, None).repair()

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


async def _ask(backends: Sequence[Any]) -> None:
    """Have each of the *backends* answer, whether it has a window or not."""
    for backend in backends:
        await backend.get_class_info(f"{model.__name__}.{model.TimeSeriesData.__name__}")


class _Stored:
    """An object of the backend, found by its alias and found again when it is gone.

    The backend finds an object's files by its alias, so an object that the key-value store has lost
    is made anew with all that it held. A reader alone reports it missing.
    """

    def __init__(self, store: DataClayStore, alias: str, make: Callable[[], Any] | None) -> None:
        self._store = store
        self._alias = alias
        self._make = make
        self._object: Any = None

    def call(self, method: str, *args: Any, deadline: float | None = None) -> Any:
        """Call an active method; once more where the object turns out to be another or gone."""
        deadline = self._store.deadline() if deadline is None else deadline
        try:
            return self._try(deadline, method, *args)
        except _MISSING:
            if self._object is None:
                raise
            self._object = self._made(self._make, deadline) if self._make is not None else None
        return self._try(deadline, method, *args)

    def _try(self, deadline: float, method: str, *args: Any) -> Any:
        found = self._object  # another thread may find it gone meanwhile
        if found is None:
            found = self._object = self._find(deadline)
        return self._store.call(getattr(found, method)(*args), deadline)

    def _find(self, deadline: float) -> Any:
        try:
            found = DataClayObject.a_get_by_alias(self._alias)
            return self._store.call(found, deadline, of_backend=False)
        except _MISSING:
            if self._make is None:
                raise
        return self._made(self._make, deadline)

    def _made(self, make: Callable[[], Any], deadline: float) -> Any:
        """The object, made anew: every process makes the same one."""
        while True:
            made = make()
            try:
                self._store.call(made.a_make_persistent(alias=self._alias), deadline)
                return made
            except _TAKEN:
                if self._alias_is_of(made, deadline):
                    self._store.call(made.a_make_persistent(), deadline)
                    return made

    def _alias_is_of(self, made: Any, deadline: float) -> bool:
        """Is it? An alias of another object, which no files belong to, is deleted."""
        aliases = self._store.aliases(deadline)
        targets = [alias.object_id for alias in aliases if alias.name == self._alias]
        if targets and targets[0] != made._dc_meta.id:
            _log.warning("alias of an unknown object deleted: alias=%s", self._alias)
            deleted = get_runtime().metadata_service.delete_alias(self._alias, _DATASET)
            with contextlib.suppress(*_MISSING):
                self._store.call(deleted, deadline, of_backend=False)
        return targets == [made._dc_meta.id]


class DataClayWindow:
    """A Window whose rows are in the backend."""

    def __init__(self, store: DataClayStore, node: str, capacity_rows: int | None) -> None:
        """Without *capacity_rows*, a window that is not there stays so."""
        alias = WINDOW + checked_name(node)
        make = (
            None if capacity_rows is None else partial(model.TimeSeriesData, alias, capacity_rows)
        )
        self._store = store
        self._node = node
        self._stored = _Stored(store, alias, make)

    def _call(self, method: str, *args: Any, extra_seconds: float = 0.0) -> Any:
        deadline = self._store.deadline() + extra_seconds
        try:
            return self._stored.call(method, *args, deadline=deadline)
        except _MISSING:
            others = [node for node in self._store.nodes(deadline) if node != self._node]
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

    def repair(self) -> str:
        report: str = self._call("repair")
        return report

    def wait(self, after: int, timeout_seconds: float) -> int:
        cursor: int = self._call("wait", after, timeout_seconds, extra_seconds=timeout_seconds)
        return cursor


class DataClayModelState:
    """A ModelState in the backend."""

    def __init__(self, store: DataClayStore, name: str) -> None:
        alias = MODEL + checked_name(name)
        self._stored = _Stored(store, alias, partial(model.ModelState, alias))

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
