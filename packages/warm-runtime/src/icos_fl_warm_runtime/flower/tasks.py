"""A task: how SuperExec describes it, how it runs, and what its host is told of it."""

import signal
import ssl
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from logging import WARNING
from typing import Any

import httpx
from flwr.supercore import log
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

from icos_fl_warm_runtime.long_poll import MARK_PATH
from icos_fl_warm_runtime.pace import Pace

_PULL_SECONDS_MAX = 3.0
"""As often as Flower asks a SuperLink that does not hold its requests."""


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
