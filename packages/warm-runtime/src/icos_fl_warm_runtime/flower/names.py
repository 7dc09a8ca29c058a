"""What of Flower is relied on, though its documentation does not name it."""

import hashlib
import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

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
    "flwr.supernode.fleet_http_client:FleetHttpClient.ActivateNode": "560fe67f",
    "flwr.supernode.fleet_http_client:FleetHttpClient.DeactivateNode": "a9537c1c",
    "flwr.supernode.fleet_http_client:FleetHttpClient.RegisterNode": "86626f63",
    "flwr.supercore.retry:make_simple_http_retry_invoker": "49e12326",
    "flwr.supernode.nodestate:NodeStateFactory": "a933795f",
    "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState": "ed77fee3",
    "flwr.supercore.corestate.in_memory_corestate:InMemoryCoreState.create_task": "ca22dc66",
}
SUPEREXEC: Final = {
    "flwr.supercore.superexec.run_superexec:run_superexec": "91e7a33c",
    "flwr.supercore.retry:make_simple_http_retry_invoker": "49e12326",
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
