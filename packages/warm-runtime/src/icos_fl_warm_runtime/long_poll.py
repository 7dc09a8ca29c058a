"""An ASGI middleware that holds an empty answer until there may be something to tell.

Flower's pullers ask, get an empty answer, and sleep. Here the empty answer is held back until a
push makes another look worthwhile, HOLD_SECONDS at most; then the puller asks again. No request is
repeated by the server, so nonces and signed timestamps stay what they are.
"""

import asyncio
import json
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse, PushObjectRequest
from flwr.proto.runtime_pb2 import PushAppMessagesRequest, PushAppMessagesResponse

HOLD_SECONDS = 20.0
"""Below the 30 s after which Flower's HTTP client gives a request up."""

REPLY_HOLD_SECONDS = 3.0
"""As often as Flower's grid asks for replies: a ServerApp's deadline is passed by no more."""

PUSH_SECONDS_MAX = 180.0
"""Objects that are not there after so long will not come: Flower ends their session."""

MARK_PATH = "/v1/icos-fl/warm"
"""Answers 204: who runs this middleware can be told of a task's death."""

STATUS_PATH = "/v1/icos-fl/status"
"""Answers with the status of the process, as JSON."""

TASK = "task"
REPLY = "reply"

_WAKING = {
    "/v1/control/start-run": TASK,
    "/v1/runtime/create-task": TASK,
    "/v1/control/stop-run": REPLY,  # its ServerApp is to hear of it
}

Scope = MutableMapping[str, Any]
ASGIMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class Waits:
    """Requests that are being held, by what they wait for. Lives on one event loop."""

    def __init__(self) -> None:
        self._events: dict[Hashable, set[asyncio.Event]] = defaultdict(set)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = False
        self._lock = threading.Lock()

    @contextmanager
    def expecting(self, what: Hashable) -> Iterator[Callable[..., Awaitable[None]]]:
        """Begin before the question is asked, so that nothing is missed; call to wait."""
        with self._lock:
            self._loop = asyncio.get_running_loop()
        event = asyncio.Event()
        self._events[what].add(event)

        async def wait(seconds: float = HOLD_SECONDS) -> None:
            if not self._over:
                with suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), seconds)

        try:
            yield wait
        finally:
            self._events[what].discard(event)
            if not self._events[what]:
                del self._events[what]

    def wake(self, what: Hashable) -> None:
        """Let those who wait for *what* look again."""
        for event in self._events.get(what, ()):
            event.set()

    def wake_from_thread(self, what: Hashable) -> None:
        """The same, from another thread than the event loop's."""
        with self._lock:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self.wake, what)

    def end(self) -> None:
        """Hold nobody any more: the server is stopping."""
        self._over = True
        for what in list(self._events):
            self.wake(what)


@dataclass
class _Push:
    """Messages of which some objects are still to come."""

    wakes: set[Hashable]
    missing: set[str]
    began: float = field(default_factory=time.monotonic)


class LongPoll:
    """The outermost middleware of a SuperLink or a SuperNode."""

    def __init__(
        self, app: ASGIApp, waits: Waits, status: Callable[[], dict[str, Any]] = dict
    ) -> None:
        self._app = app
        self._status = status
        self._waits = waits
        self._pushes: dict[str, list[_Push]] = {}
        """By the object that is missing."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif path == MARK_PATH:
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        elif path == STATUS_PATH:
            facts = await asyncio.to_thread(self._status)  # which may ask a database
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps(facts).encode()})
        elif path == "/v1/runtime/acquire-task":
            await self._held(TASK, scope, receive, send)
        elif path == "/v1/runtime/pull-messages":
            await self._held(REPLY, scope, receive, send)
        elif path == "/v1/fleet/pull-messages":
            body = await _body(receive)
            node_id = PullMessagesRequest.FromString(body).node.node_id
            await self._held(node_id, scope, _again(body, receive), send)
        elif path.endswith("/pull-object"):
            await self._pull_object(scope, receive, send)
        elif path.endswith("/push-object"):
            await self._push_object(scope, receive, send)
        elif path.endswith("/push-messages"):
            await self._push_messages(path, scope, receive, send)
        elif path in _WAKING:
            await self._app(scope, receive, send)
            self._waits.wake(_WAKING[path])
        else:
            await self._app(scope, receive, send)

    async def _held(self, what: Hashable, scope: Scope, receive: Receive, send: Send) -> None:
        with self._waits.expecting(what) as wait:
            answer = await self._answer(scope, receive)
            if answer.is_empty:
                await wait(REPLY_HOLD_SECONDS if what == REPLY else HOLD_SECONDS)
        await answer.send(send)

    async def _pull_object(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An object that is on its way is waited for: who gets an empty answer sleeps for 1 s."""
        if self._pushes:
            body = await _body(receive)
            object_id = PullObjectRequest.FromString(body).object_id
            with self._waits.expecting(object_id) as wait:
                # It may have come in another way: the push that announced it may have died.
                if object_id in self._pushes and not await self._has(scope, _again(body, receive)):
                    await wait()
            receive = _again(body, receive)
        await self._app(scope, receive, send)

    async def _has(self, scope: Scope, receive: Receive) -> bool:
        """Whether the object asked for is there; no question for an object carries a nonce."""
        answer = await self._answer(dict(scope), receive)
        return not answer.is_good or PullObjectResponse.FromString(answer.body).object_available

    async def _push_object(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._pushes:
            await self._app(scope, receive, send)
            return
        body = await _body(receive)
        answer = await self._answer(scope, _again(body, receive))
        if answer.is_good:
            object_id = PushObjectRequest.FromString(body).object_id
            for push in self._pushes.pop(object_id, ()):
                push.missing.discard(object_id)
                self._wake_if_whole(push)
            self._waits.wake(object_id)
        await answer.send(send)

    async def _push_messages(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        answer = await self._answer(scope, _again(body, receive))
        if answer.is_good:
            if path == "/v1/fleet/push-messages":
                messages: Iterable[Any] = PushMessagesRequest.FromString(body).messages_list
                missing = PushMessagesResponse.FromString(answer.body).objects_to_push
            else:
                messages = PushAppMessagesRequest.FromString(body).messages_list
                missing = PushAppMessagesResponse.FromString(answer.body).objects_to_push
            self._forget_old_pushes()
            wakes: set[Hashable] = {
                REPLY if message.metadata.reply_to_message_id else message.metadata.dst_node_id
                for message in messages
            }
            push = _Push(wakes, set(missing))
            for object_id in push.missing:
                self._pushes.setdefault(object_id, []).append(push)
            self._wake_if_whole(push)
        await answer.send(send)

    def _wake_if_whole(self, push: _Push) -> None:
        if not push.missing:
            for what in push.wakes:
                self._waits.wake(what)

    def _forget_old_pushes(self) -> None:
        oldest = time.monotonic() - PUSH_SECONDS_MAX
        for object_id, pushes in list(self._pushes.items()):
            kept = [push for push in pushes if push.began > oldest]
            if kept:
                self._pushes[object_id] = kept
            else:
                del self._pushes[object_id]

    async def _answer(self, scope: Scope, receive: Receive) -> "_Answer":
        messages: list[ASGIMessage] = []

        async def keep(message: ASGIMessage) -> None:
            messages.append(message)

        await self._app(scope, receive, keep)
        return _Answer(messages)


class _Answer:
    """A response that is complete."""

    def __init__(self, messages: list[ASGIMessage]) -> None:
        self._messages = messages
        self.body = b"".join(message.get("body", b"") for message in messages)
        self.is_good = bool(messages) and messages[0].get("status") == 200

    @property
    def is_empty(self) -> bool:
        """No message, no task: in protobuf, no bytes."""
        return self.is_good and not self.body

    async def send(self, send: Send) -> None:
        for message in self._messages:
            await send(message)


async def _body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, for the application."""
    told = False

    async def replay() -> ASGIMessage:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
