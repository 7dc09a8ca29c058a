"""The ClientApp of a virtual node: that of icos-fl-client, told who and where the node is.

Flower's simulation runtime says of a virtual node only which partition it is, from 0. Partition i
is the i-th of the nodes that the processor lists, by name. The processor's address is in the run
configuration, since it is the same for all.
"""

import functools
from copy import copy

from flwr.app import Context, Message
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from icos_fl_client.app import app as node_app
from icos_fl_client.processor_client import ProcessorClient

PROCESSOR_ADDRESS = "processor-address"

app = ClientApp()


@app.query()
@app.train()
@app.evaluate()
def run(message: Message, context: Context) -> Message:
    """What the node answers; its state is that of the virtual node."""
    virtual = copy(context)
    virtual.node_config = node_config(context)
    reply = node_app(message, virtual)
    context.state = virtual.state
    return reply


def node_config(context: Context) -> UserConfig:
    """What a SuperNode would have got by ``--node-config``; nothing is kept in a store."""
    address = str(context.run_config[PROCESSOR_ADDRESS])
    return {
        "node-name": _names(address)[int(context.node_config["partition-id"])],
        "processor-address": address,
        "store-address": "",
        "threads": 1,  # as many workers run at once as there are cores
    }


@functools.cache
def _names(address: str) -> list[str]:
    """Asked once a worker: the windows do not change while a simulation runs."""
    with ProcessorClient(address) as processor:
        return sorted(processor.nodes())
