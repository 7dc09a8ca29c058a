"""What changes in a SuperLink, a SuperNode and a SuperExec."""

import argparse
import logging
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from flwr.supercore.constant import ExecutorType
from icos_fl_service import status

from icos_fl_warm_runtime.certificates import renew_at_sighup
from icos_fl_warm_runtime.flower.nodestate import node_state_factory
from icos_fl_warm_runtime.flower.returning import SUPERLINK, take_over_at_start
from icos_fl_warm_runtime.flower.status import status_of, tell_of_retries, tell_of_runs
from icos_fl_warm_runtime.long_poll import TASK, LongPoll, Waits
from icos_fl_warm_runtime.pace import Pace

_PULL_SECONDS_MAX = 3.0
"""As often as Flower asks a SuperLink that does not hold its requests."""
_SHUTDOWN_SECONDS = 3
"""For requests in hand. Who follows a run's log has one for as long as the run."""

Starter = Callable[[], Callable[..., Any]]
"""Gives what starts a SuperExec, with the arguments and the result of ``subprocess.Popen``."""


def starts_superexec(name: str) -> bool:
    """Whether Flower's *name*, with the options in sys.argv, does: not in process isolation."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--isolation")
    return name != "superexec" and parser.parse_known_args()[0].isolation != "process"


def warm_superlink(starter: Starter | None) -> None:
    """From now on, Flower's SuperLink in this process holds requests.

    What *starter* gives starts its SuperExec; without it somebody else does.
    """
    _hold_requests("flwr.superlink.main", Waits(), "superlink", tell_of_runs)
    if starter:
        _start_superexec_by("flwr.superlink.cli.flower_superlink", starter())
    renew_at_sighup()
    # A hundred lines a round that say that all is well would fill a disk in months.
    logging.getLogger("uvicorn.access").addFilter(_is_bad_news)


def _is_bad_news(record: logging.LogRecord) -> bool:
    """Of uvicorn's access log, whose last argument is the status."""
    return not isinstance(record.args, tuple) or int(str(record.args[-1])) >= 400


def warm_supernode(starter: Starter | None) -> None:
    """From now on, Flower's SuperNode in this process holds requests, and asks without a pause."""
    waits = Waits()
    _hold_requests("flwr.supernode.main", waits, "supernode")
    if starter:
        _start_superexec_by("flwr.supernode.start_client_internal", starter())
    renew_at_sighup()
    take_over_at_start()
    tell_of_retries(import_module("flwr.supernode.fleet_http_connection"), SUPERLINK)
    client: Any = import_module("flwr.supernode.start_client_internal")
    client.http_request_response = _asking_again(client.http_request_response, waits)
    command: Any = import_module("flwr.supernode.cli.flower_supernode")
    command.NodeStateFactory = node_state_factory()


def _hold_requests(
    module_name: str, waits: Waits, name: str, made: Callable[[Any], None] = lambda _app: None
) -> None:
    """In the application that *module_name* makes, which *made* is called with."""
    module: Any = import_module(module_name)
    create = module.create_app

    def create_app(*args: Any, **kwargs: Any) -> Any:
        app = create(*args, **kwargs)
        # The last one is the outermost.
        app.add_middleware(LongPoll, waits=waits, status=partial(status_of, name))
        made(app)
        return app

    module.create_app = create_app
    server: Any = import_module("uvicorn").Server
    shutdown = server.shutdown

    async def let_go_and_shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
        waits.end()  # it waits for open requests
        self.config.timeout_graceful_shutdown = _SHUTDOWN_SECONDS
        await shutdown(self, *args, **kwargs)

    server.shutdown = let_go_and_shutdown


def _start_superexec_by(module_name: str, start: Callable[..., Any]) -> None:
    """In place of ``flower-superexec``, which *module_name* starts by that name."""

    class Subprocess:
        """What the module uses of subprocess."""

        TimeoutExpired = subprocess.TimeoutExpired
        Popen = staticmethod(start)

    module: Any = import_module(module_name)
    module.subprocess = Subprocess


def _asking_again(connect: Callable[..., Any], waits: Waits) -> Callable[..., Any]:
    """Flower's connection to the SuperLink, of which ``receive`` returns with a message only."""

    status.waits_for(SUPERLINK, "it has not answered yet")

    @contextmanager
    def connected(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, ...]]:
        with connect(*args, **kwargs) as connection:
            status.has(SUPERLINK)
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


def warm_superexec(executor: Callable[[], Any]) -> None:
    """From now on, an *executor* starts the tasks of Flower's SuperExec in this process."""
    module: Any = import_module("flwr.supercore.superexec.run_superexec")
    tell_of_retries(module, "superlink or supernode")
    stock = module.get_executor

    def get_executor(executor_type: Any, **kwargs: Any) -> Any:
        if executor_type == ExecutorType.SUBPROCESS:
            return executor()
        return stock(executor_type, **kwargs)

    module.get_executor = get_executor
    # The executor's pace is slower where the host does not hold requests.
    module._get_task_poll_interval = lambda: 0.0
