"""What can go wrong between a service and its store."""


class StoreError(Exception):
    """Base of all errors of the store."""


class StoreUnavailable(StoreError):
    """The store does not answer now. The same call may succeed later; nothing of it is lost."""


class StoreFull(StoreUnavailable):
    """The store cannot write now: a full disk, or more waits for a slow one than memory may hold.

    Nothing of the refused call is kept. It succeeds as soon as there is room.
    """


class StoreDamaged(StoreUnavailable):
    """What is on disk of a window or a model state is not what was acknowledged.

    Nothing is read of it, and nothing written, until somebody has had it repaired.
    """


class UnknownNode(StoreError):
    """No window of that node is in the store."""

    def __init__(self, node: str, nodes: list[str]) -> None:
        known = ", ".join(nodes) or "none"
        super().__init__(f"no window of node {node!r}; nodes with a window: {known}")
        self.node = node
        self.nodes = nodes


class InvalidRows(StoreError):
    """Rows that no window could hold, such as two columns of one name; the message names it."""
