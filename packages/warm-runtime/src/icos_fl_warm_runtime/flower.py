"""All that is known of Flower's inside, and where it is touched.

Nothing of Flower is changed on disk. Names of its modules are given other values in this process;
``NAMES`` holds what those replacements rely on, with a digest of its source, and ``changed`` tells
what is no longer as it was. Then the stock path is taken.
"""

import argparse
import hashlib
import inspect
import logging
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from logging import WARNING
from typing import Any, Final

import httpx
from flwr.supercore import log
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, ExecutorType
from flwr.supercore.logger import FLOWER_LOGGER, console_handler
from icos_fl_service import logs

from icos_fl_warm_runtime.long_poll import MARK_PATH, TASK, LongPoll, Waits
from icos_fl_warm_runtime.pace import Pace

_PULL_SECONDS_MAX = 3.0
"""As often as Flower asks a SuperLink that does not hold its requests."""

_REPLY_SECONDS = 0.5
"""As often as Flower looks whether a task's token has expired."""

SUPERLINK: Final = {
    "flwr.superlink.main:create_app": "ee966b63",
    "flwr.superlink.cli.flower_superlink:SuperLinkLifespan._start_superexec_if_needed": "134a554c",
    "flwr.superlink.cli.flower_superlink:_run_superlink_http_api": "eb0d78b8",
    "flwr.superlink.cli.flower_superlink:_get_superexec_command": "5d60007f",
    "flwr.supercore.protobuf.client:ProtobufClient": "e2206492",
}
SUPERNODE: Final = {
    "flwr.supernode.main:create_app": "f7215c8a",
    "flwr.supernode.cli.flower_supernode:flower_supernode": "e263e104",
    "flwr.supernode.start_client_internal:start_client_internal": "9e89a6eb",
    "flwr.supernode.start_client_internal:_pull_and_store_message": "eaf5d0e3",
    "flwr.supernode.start_client_internal:_push_messages": "00bb86fa",
    "flwr.supernode.fleet_http_connection:http_request_response": "b80ca367",
    "flwr.supernode.nodestate:NodeStateFactory": "a933795f",
    "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState": "ed77fee3",
    "flwr.supercore.corestate.in_memory_corestate:InMemoryCoreState.create_task": "ca22dc66",
}
SUPEREXEC: Final = {
    "flwr.supercore.superexec.run_superexec:run_superexec": "91e7a33c",
    "flwr.supercore.superexec.executor.types:ExecutionSpec": "a52aad63",
    "flwr.supercore.superexec.executor.types:Executor": "c6d3173d",
    "flwr.supercore.superexec.executor.subprocess_executor:SubprocessExecutor": "9c58435e",
}
CLIENTAPP: Final = {
    "flwr.supernode.cli.flwr_clientapp:flwr_clientapp": "9e02b412",
    "flwr.supernode.runtime.run_clientapp:run_clientapp": "6ce09559",
    "flwr.supernode.runtime.run_clientapp:pull_task_input": "5607a23e",
}
SERVERAPP: Final = {
    "flwr.superlink.cli.flwr_serverapp:flwr_serverapp": "b274501e",
    "flwr.superlink.runtime.run_serverapp:run_serverapp": "2cf00cc3",
    "flwr.superlink.grid.http_grid:HttpGrid.send_and_receive": "699c9f04",
}
NAMES: Final = {
    "superlink": SUPERLINK,
    "supernode": SUPERNODE,
    "superexec": SUPEREXEC,
    "flwr-clientapp": CLIENTAPP,
    "flwr-serverapp": SERVERAPP,
}
"""By the process that relies on them; the last two are tasks."""


def digest(name: str) -> str:
    """Of the source of ``module:attribute``. Raises ImportError, AttributeError, OSError."""
    module, _, path = name.partition(":")
    value: Any = import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return hashlib.sha256(inspect.getsource(value).encode()).hexdigest()[:8]


def changed(names: Mapping[str, str]) -> list[str]:
    """Which of *names* are gone, or are no longer what this module was written against."""
    found = []
    for name, known in names.items():
        try:
            if digest(name) != known:
                found.append(name)
        except (ImportError, AttributeError, OSError):
            found.append(f"{name} (gone)")
    return found


def warm(name: str, run_superexec: Callable[[], None]) -> None:
    """Make Flower's *name* warm; if it starts a SuperExec, that is *run_superexec*."""
    if name == "superexec":
        warm_superexec()
    elif name == "superlink":
        warm_superlink(run_superexec)
    else:
        warm_supernode(run_superexec)


def starts_superexec(name: str) -> bool:
    """Whether Flower's *name*, with the options in sys.argv, does: not in process isolation."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--isolation")
    return name != "superexec" and parser.parse_known_args()[0].isolation != "process"


def tell_in_json() -> None:
    """Have Flower's lines and uvicorn's be JSON, unless a person reads them on a terminal."""
    logs.configure()
    logs.configure_libraries()
    FLOWER_LOGGER.propagate = False  # it has a handler of its own
    if sys.stderr.isatty():
        return
    formatter = logs.library_formatter()
    # Its class formats by itself, whatever formatter it is given.
    console_handler.format = formatter.format  # type: ignore[method-assign]
    console_handler.addFilter(lambda record: bool(record.getMessage().strip()))
    config: Any = import_module("uvicorn").Config
    configure = config.configure_logging

    def configure_in_json(self: Any) -> None:
        configure(self)
        for name in ("uvicorn", "uvicorn.access", "uvicorn.error"):
            for handler in logging.getLogger(name).handlers:
                handler.setFormatter(formatter)

    config.configure_logging = configure_in_json


# SuperLink and SuperNode: hold requests, start our SuperExec


def warm_superlink(run_superexec: Callable[[], None]) -> None:
    """From now on, Flower's SuperLink in this process holds requests."""
    _hold_requests("flwr.superlink.main", Waits())
    if starts_superexec("superlink"):
        _start_warm_superexec("flwr.superlink.cli.flower_superlink", run_superexec)
    # A hundred lines a round that say that all is well would fill a disk in months.
    logging.getLogger("uvicorn.access").addFilter(_is_bad_news)


def _is_bad_news(record: logging.LogRecord) -> bool:
    """Of uvicorn's access log, whose last argument is the status."""
    return not isinstance(record.args, tuple) or int(str(record.args[-1])) >= 400


def warm_supernode(run_superexec: Callable[[], None]) -> None:
    """From now on, Flower's SuperNode in this process holds requests, and asks without a pause."""
    waits = Waits()
    _hold_requests("flwr.supernode.main", waits)
    if starts_superexec("supernode"):
        _start_warm_superexec("flwr.supernode.start_client_internal", run_superexec)
    client: Any = import_module("flwr.supernode.start_client_internal")
    client.http_request_response = _asking_again(client.http_request_response, waits)
    command: Any = import_module("flwr.supernode.cli.flower_supernode")
    command.NodeStateFactory = _node_state_factory()


def _hold_requests(module_name: str, waits: Waits) -> None:
    module: Any = import_module(module_name)
    create = module.create_app

    def create_app(*args: Any, **kwargs: Any) -> Any:
        app = create(*args, **kwargs)
        app.add_middleware(LongPoll, waits=waits)  # the last one is the outermost
        return app

    module.create_app = create_app
    server: Any = import_module("uvicorn").Server
    shutdown = server.shutdown

    async def let_go_and_shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
        waits.end()  # it waits for open requests
        await shutdown(self, *args, **kwargs)

    server.shutdown = let_go_and_shutdown


def _start_warm_superexec(module_name: str, run: Callable[[], None]) -> None:
    """In place of ``flower-superexec``, which *module_name* starts by that name."""
    from icos_fl_warm_runtime.superexec import ForkedSuperExec

    try:
        start: Any = ForkedSuperExec(run).start
    except RuntimeError as error:
        log(WARNING, "The SuperExec imports for itself what its host has: %s", error)
        ours = [sys.executable, "-m", "icos_fl_warm_runtime", "superexec"]

        def start(command: list[str], **kwargs: Any) -> Any:
            return subprocess.Popen([*ours, *command[1:]], **kwargs)

    class Subprocess:
        """What the module uses of subprocess."""

        TimeoutExpired = subprocess.TimeoutExpired
        Popen = staticmethod(start)

    module: Any = import_module(module_name)
    module.subprocess = Subprocess


def _asking_again(connect: Callable[..., Any], waits: Waits) -> Callable[..., Any]:
    """Flower's connection to the SuperLink, of which ``receive`` returns with a message only."""

    @contextmanager
    def connected(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, ...]]:
        with connect(*args, **kwargs) as connection:
            node_id, receive, *others, confirm = connection
            pace = Pace(_PULL_SECONDS_MAX)

            def receive_at_once() -> Any:
                pace.start_again()
                while (received := receive()) is None:
                    pace.sleep()
                return received

            def confirm_and_wake(run_id: int, object_id: str) -> None:
                confirm(run_id, object_id)
                waits.wake_from_thread(TASK)  # by now all objects of the message are here

            yield node_id, receive_at_once, *others, confirm_and_wake

    return connected


def _node_state_factory() -> type:
    """A factory of node states that wake who waits for a reply, and reply for the dead."""
    from flwr.app import Error
    from flwr.common.constant import ErrorCode
    from flwr.supercore.constant import TaskType
    from flwr.supernode.nodestate import NodeStateFactory
    from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

    class NodeState(InMemoryNodeState):
        """Of one message at a time, as the SuperNode works."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._changed = threading.Condition()
            self._task: int | None = None
            self._reply = ""
            self._missing: set[str] = set()

        def create_task(self, *args: Any, **kwargs: Any) -> int | None:
            task_id: int | None = super().create_task(*args, **kwargs)
            self._task = task_id  # before its message is stored
            return task_id

        def store_message_and_object_tree(
            self, message: Any, object_tree: Any, session_id: str
        ) -> tuple[bool, list[str]]:
            reply = message.metadata.message_id if message.metadata.reply_to_message_id else ""
            if reply:
                with self._changed:  # nobody takes it before it is known what is missing
                    self._reply, self._missing = reply, {reply}
            stored, missing = super().store_message_and_object_tree(
                message, object_tree, session_id
            )
            if reply:
                with self._changed:
                    self._missing = set(missing)
                    self._changed.notify_all()
            return stored, missing

        def store_object(self, run_id: int, session_id: str, object_id: str, content: bytes) -> Any:
            stored = super().store_object(run_id, session_id, object_id, content)
            with self._changed:
                self._missing.discard(object_id)
                self._changed.notify_all()
            return stored

        def get_messages_legacy(self, *, is_reply: bool | None = None, **filters: Any) -> Any:
            """Returns with a reply that is whole, if it is replies that are asked for."""
            while True:
                with self._changed:
                    if not self._missing:
                        self._reply = ""
                # Each look ends a task whose token has expired, too.
                found = super().get_messages_legacy(is_reply=is_reply, **filters)
                if not is_reply:
                    return found
                with self._changed:
                    if whole := [message for message in found if not self._is_partial(message)]:
                        return whole
                    self._changed.wait_for(
                        lambda: self._reply and not self._missing, _REPLY_SECONDS
                    )

        def _is_partial(self, message: Any) -> bool:
            message_id = message.metadata.message_id
            if not self._missing or message_id != self._reply:
                return False
            if entry := self.msg_store.get(message_id):
                entry.is_retrieved = False  # to be found again
            return True

        def finish_task(self, task_id: int, sub_status: str, details: str) -> bool:
            finished: bool = super().finish_task(task_id, sub_status, details)
            tasks = self.get_tasks(task_ids=[task_id]) if finished else []
            if tasks and tasks[0].type == TaskType.CLIENT_APP and task_id == self._task:
                reason = details or "the ClientApp: it could not send its reply"
                error = Error(ErrorCode.CLIENT_APP_CRASHED, reason)
                self._store_error_replies({tasks[0].run_id}, error)
            return finished

        def _on_task_tokens_expired(self, tasks: list[Any]) -> None:
            """Of an older task nobody expects a reply: the next one's message is here."""
            super()._on_task_tokens_expired([task for task in tasks if task.task_id == self._task])

        def _store_error_replies(self, run_ids: set[int], error: Any) -> None:
            """Unless the task has replied, a reply that says how it ended."""
            with self._changed:
                partial, self._missing = self._reply if self._missing else "", set()
            if partial:  # it died while it sent its reply
                self.delete_messages(message_ids=[partial])
                self.object_store.delete(partial)
            with self.lock_msg_store:
                for message_id, entry in self.msg_store.items():
                    if not entry.message.metadata.reply_to_message_id:
                        entry.is_retrieved = True  # it may have died before it asked
                        if message_id not in self.time_store:
                            self.record_message_processing_start(message_id)
            super()._store_error_replies(run_ids, error)
            with self._changed:
                self._reply = "told"
                self._changed.notify_all()

    class Factory(NodeStateFactory):
        def state(self) -> Any:
            with self.lock:
                if self.state_instance is None:
                    self.state_instance = NodeState(self.objectstore_factory.store())
                return self.state_instance

    return Factory


# SuperExec


def warm_superexec() -> None:
    """From now on, Flower's SuperExec in this process has its tasks forked."""
    from icos_fl_warm_runtime.executor import ForkExecutor

    module: Any = import_module("flwr.supercore.superexec.run_superexec")
    stock = module.get_executor

    def get_executor(executor_type: Any, **kwargs: Any) -> Any:
        if executor_type == ExecutorType.SUBPROCESS:
            return ForkExecutor()
        return stock(executor_type, **kwargs)

    module.get_executor = get_executor
    # The executor's pace is slower where the host does not hold requests.
    module._get_task_poll_interval = lambda: 0.0


def command_of(spec: Any) -> str:
    """Flower's command for the task."""
    return str(TASK_TYPE_TO_COMMAND[spec.task_type])


def arguments_of(spec: Any) -> list[str]:
    """What SuperExec's own executor gives the task's command."""
    arguments = ["--runtime-api-address", spec.runtime_api_address, "--token", spec.token]
    if spec.insecure:
        arguments.append("--insecure")
    elif spec.root_certificates_path is not None:
        arguments += ["--root-certificates", spec.root_certificates_path]
    if spec.parent_pid is not None:
        arguments += ["--parent-pid", str(spec.parent_pid)]
    if spec.runtime_dependency_install:
        arguments.append("--allow-runtime-dependency-installation")
    return arguments


def report_start(spec: Any) -> None:
    """Keep the task's token alive while its worker still imports."""
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

    with suppress(httpx.HTTPError), _host_of(spec) as host:
        host.SendTaskHeartbeat(SendTaskHeartbeatRequest())


def report_death(spec: Any, how: str) -> None:
    """Tell the task's host that it has ended without a word; *how* becomes the reason.

    A SuperNode of Flower's own would wait for a reply for ever: it is left to find out by itself,
    when the task's token expires.
    """
    from flwr.common.constant import SubStatus
    from flwr.proto.runtime_pb2 import PushTaskOutputRequest

    is_client = command_of(spec) == "flwr-clientapp"
    details = f"the {'ClientApp' if is_client else 'ServerApp'}: {how}"
    log(WARNING, "Task %d, %s", spec.task_id, details)
    try:
        if is_client and not _is_warm(spec):
            return
        with _host_of(spec) as host:
            host.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=details))
    except httpx.HTTPError as error:
        log(WARNING, "Its host was not told: %s", error)


def _host_of(spec: Any) -> Any:
    """A client of the Runtime API that has the task, in the task's name."""
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
    )
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supercore.tls import validate_and_resolve_root_certificates

    return RuntimeHttpClient.from_server_address(
        spec.runtime_api_address,
        spec.insecure,
        validate_and_resolve_root_certificates(spec.root_certificates_path, spec.insecure),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            RuntimeTokenHttpInterceptor(spec.token),
        ],
    )


def _is_warm(spec: Any) -> bool:
    scheme = "http" if spec.insecure else "https"
    verify = ssl.create_default_context(cafile=spec.root_certificates_path)
    answer = httpx.get(f"{scheme}://{spec.runtime_api_address}{MARK_PATH}", verify=verify)
    return answer.status_code == 204


# Tasks

_IMPORTED_LATE = ("httpcore", "h11", "encodings.cp437", "numpy.random")
"""What httpx, zipfile and numpy import when they are first used, which is in each task."""


def warm_tasks(command: str) -> None:
    """Import what Flower's *command* needs, and have it work without Flower's pauses."""
    for name in _IMPORTED_LATE:
        import_module(name)
    if command == "flwr-serverapp":
        module: Any = import_module("flwr.superlink.runtime.run_serverapp")
        import_module("flwr.superlink.cli.flwr_serverapp")
        module.HttpGrid.send_and_receive = _send_and_receive
    else:
        module = import_module("flwr.supernode.runtime.run_clientapp")
        import_module("flwr.supernode.cli.flwr_clientapp")
        module.pull_task_input = _ending_with_the_message(module.pull_task_input)


def run_task(command: str) -> None:
    """Run Flower's *command* with the arguments in sys.argv; ends in SystemExit."""
    if command == "flwr-serverapp":
        from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

        flwr_serverapp()
    else:
        from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

        flwr_clientapp()


def _send_and_receive(
    grid: Any, messages: Iterable[Any], *, timeout: float | None = None
) -> Iterable[Any]:
    """As Flower's, with a pause only where the SuperLink does not hold the question."""
    pending = set(grid.push_messages(messages))
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    replies: list[Any] = []
    pace = Pace(_PULL_SECONDS_MAX)
    while pending and time.monotonic() < deadline:
        if new := list(grid.pull_messages(pending)):
            pending -= {reply.metadata.reply_to_message_id for reply in new}
            replies += new
            pace.start_again()
        else:
            pace.sleep(until=deadline)
    return replies


def _ending_with_the_message(pull: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let the kernel end a task whose message has outlived its time: nobody waits for its reply."""

    def pull_and_limit(client: Any) -> Any:
        message, context, run, fab = pull(client)
        signal.setitimer(signal.ITIMER_REAL, message.metadata.ttl)
        return message, context, run, fab

    return pull_and_limit
