"""A SuperNode's messages: who waits for a reply is woken, and the dead are replied for."""

import threading
from typing import Any

_REPLY_SECONDS = 0.5
"""As often as Flower looks whether a task's token has expired."""


def node_state_factory() -> type:
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
