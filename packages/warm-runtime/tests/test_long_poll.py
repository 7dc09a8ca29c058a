"""The middleware, spoken to as uvicorn does, around an application that the test answers for."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import (
    Message,
    Metadata,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PushAppMessagesRequest, PushAppMessagesResponse
from icos_fl_warm_runtime import long_poll
from icos_fl_warm_runtime.long_poll import MARK_PATH, TASK, LongPoll, Waits

ACQUIRE = "/v1/runtime/acquire-task"
NODE_PULL, NODE_PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-messages"
APP_PULL, APP_PUSH = "/v1/runtime/pull-messages", "/v1/runtime/push-messages"
PULL_OBJECT, PUSH_OBJECT = "/v1/fleet/pull-object", "/v1/runtime/push-object"
SECONDS_MAX = 10.0
"""What is awaited happens at once, or never."""


class Host:
    """An application that answers what the test says, and the middleware around it."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.asked: list[tuple[str, bytes]] = []
        self.waits = Waits()
        self.middleware = LongPoll(self._answer, self.waits)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.asked.append((path, (await receive())["body"]))
        status, body = self.answers.get(path, (200, b""))
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    def ask(self, path: str, body: bytes = b"") -> "asyncio.Task[tuple[int, bytes]]":
        """Begin a request."""
        return asyncio.ensure_future(self._ask(path, body))

    async def _ask(self, path: str, body: bytes) -> tuple[int, bytes]:
        # In two parts, as a body may come.
        parts = [(body[:1], True), (body[1:], False)]
        said: list[Any] = []

        async def receive() -> Any:
            part, more = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": more}

        async def send(message: Any) -> None:
            said.append(message)

        if path in (ACQUIRE, APP_PULL):  # passed on as they come
            parts[:] = [(body, False)]
        await self.middleware({"type": "http", "path": path}, receive, send)
        return said[0]["status"], b"".join(message.get("body", b"") for message in said)

    async def held(self, request: "asyncio.Task[Any]") -> bool:
        """Whether it has no answer, although nothing else is left to do."""
        for _ in range(50):
            await asyncio.sleep(0)
        return not request.done()


def run(test: Callable[[Host], Awaitable[None]]) -> Callable[[], None]:
    """A test as a coroutine, which ends in SECONDS_MAX."""

    def running() -> None:
        async def limited() -> None:
            await asyncio.wait_for(test(Host()), SECONDS_MAX)

        asyncio.run(limited())

    running.__name__, running.__doc__ = test.__name__, test.__doc__
    return running


def pull(node_id: int) -> bytes:
    return PullMessagesRequest(node=Node(node_id=node_id)).SerializeToString()


def message(node_id: int = 0, reply_to: str = "") -> Message:
    return Message(metadata=Metadata(dst_node_id=node_id, reply_to_message_id=reply_to))


def push_of_app(host: Host, *messages: Message, missing: tuple[str, ...] = ()):
    host.answers[APP_PUSH] = (
        200,
        PushAppMessagesResponse(message_ids=["m"], objects_to_push=missing).SerializeToString(),
    )
    return host.ask(APP_PUSH, PushAppMessagesRequest(messages_list=messages).SerializeToString())


def push_of_node(host: Host, *messages: Message, missing: tuple[str, ...] = ()):
    host.answers[NODE_PUSH] = (
        200,
        PushMessagesResponse(objects_to_push=missing, results={"m": 0}).SerializeToString(),
    )
    return host.ask(NODE_PUSH, PushMessagesRequest(messages_list=messages).SerializeToString())


def push_object(host: Host, object_id: str):
    return host.ask(PUSH_OBJECT, PushObjectRequest(object_id=object_id).SerializeToString())


def pull_object(host: Host, object_id: str, *, there: bool):
    host.answers[PULL_OBJECT] = (
        200,
        PullObjectResponse(object_found=True, object_available=there).SerializeToString(),
    )
    return host.ask(PULL_OBJECT, PullObjectRequest(object_id=object_id).SerializeToString())


@run
async def test_an_empty_answer_is_held_until_there_may_be_another(host):
    question = host.ask(ACQUIRE)
    assert await host.held(question)
    host.waits.wake(TASK)
    assert await question == (200, b"")
    assert host.asked == [(ACQUIRE, b"")]  # the application is not asked twice


@run
async def test_an_answer_that_is_not_empty_is_not_held(host):
    host.answers[ACQUIRE] = (200, b"a task")
    assert await host.ask(ACQUIRE) == (200, b"a task")


@pytest.mark.parametrize("path", [ACQUIRE, APP_PULL, NODE_PULL])
def test_a_refusal_is_passed_on_at_once(path):
    @run
    async def test(host):
        host.answers[path] = (401, b"")
        assert await host.ask(path, pull(7)) == (401, b"")

    test()


@run
async def test_a_started_run_wakes_who_asks_for_tasks(host):
    question = host.ask(ACQUIRE)
    assert await host.held(question)
    assert await host.ask("/v1/control/start-run", b"run") == (200, b"")
    assert await question == (200, b"")


@run
async def test_a_message_wakes_the_node_that_it_is_for(host):
    mine, other = host.ask(NODE_PULL, pull(7)), host.ask(NODE_PULL, pull(8))
    assert await host.held(mine)
    await push_of_app(host, message(7))
    assert await mine == (200, b"")
    assert await host.held(other)
    host.waits.end()
    await other


@run
async def test_a_message_wakes_when_its_last_object_is_in(host):
    question = host.ask(NODE_PULL, pull(7))
    await push_of_app(host, message(7), missing=("a", "b"))
    await push_object(host, "a")
    assert await host.held(question)
    await push_object(host, "b")
    assert await question == (200, b"")


@run
async def test_an_object_that_was_refused_wakes_nobody(host):
    question = host.ask(NODE_PULL, pull(7))
    await push_of_app(host, message(7), missing=("a",))
    host.answers[PUSH_OBJECT] = (500, b"")
    assert await push_object(host, "a") == (500, b"")
    assert await host.held(question)
    host.answers[PUSH_OBJECT] = (200, b"")
    await push_object(host, "a")
    assert await question == (200, b"")


@run
async def test_an_object_that_two_messages_share_completes_both(host):
    questions = [host.ask(NODE_PULL, pull(node)) for node in (7, 8)]
    await push_of_app(host, message(7), missing=("a",))
    await push_of_app(host, message(8), missing=("a",))
    await push_object(host, "a")
    assert await asyncio.gather(*questions) == [(200, b"")] * 2


@run
async def test_a_reply_wakes_the_serverapp(host):
    question = host.ask(APP_PULL)
    assert await host.held(question)
    await push_of_node(host, message(reply_to="m"), missing=("a",))
    assert await host.held(question)
    await push_object(host, "a")
    assert await question == (200, b"")


def test_a_serverapps_own_deadline_is_passed_by_no_more_than_with_flower(monkeypatch):
    monkeypatch.setattr(long_poll, "REPLY_HOLD_SECONDS", 0.05)

    @run
    async def test(host):
        assert await host.ask(APP_PULL) == (200, b"")

    test()
    assert long_poll.HOLD_SECONDS < 30  # what Flower's client waits for an answer


@run
async def test_an_object_on_its_way_is_waited_for(host):
    await push_of_app(host, message(7), missing=("a",))
    question = pull_object(host, "a", there=False)
    assert await host.held(question)
    host.answers[PULL_OBJECT] = (200, b"there")
    await push_object(host, "a")
    assert await question == (200, b"there")


@run
async def test_an_object_that_came_in_another_way_is_not_waited_for(host):
    await push_of_app(host, message(7), missing=("a",))
    status, _ = await pull_object(host, "a", there=True)
    assert status == 200


@run
async def test_an_object_that_nobody_pushes_is_not_waited_for(host):
    status, _ = await pull_object(host, "a", there=False)
    assert status == 200


def test_what_was_announced_and_never_came_is_forgotten(monkeypatch):
    monkeypatch.setattr(long_poll, "PUSH_SECONDS_MAX", -1.0)

    @run
    async def test(host):
        await push_of_app(host, message(7), missing=("a",))
        await push_of_app(host, message(7), missing=("b",))
        assert list(host.middleware._pushes) == ["b"]

    test()


@run
async def test_at_the_end_nobody_is_held(host):
    questions = [host.ask(ACQUIRE), host.ask(APP_PULL), host.ask(NODE_PULL, pull(7))]
    assert await host.held(questions[0])
    host.waits.end()
    assert await asyncio.gather(*questions) == [(200, b"")] * 3
    assert await host.ask(ACQUIRE) == (200, b"")  # nor held from then on


@run
async def test_who_goes_away_is_forgotten(host):
    question = host.ask(ACQUIRE)
    assert await host.held(question)
    question.cancel()
    await asyncio.wait([question])
    assert not host.waits._events
    host.waits.wake(TASK)


@run
async def test_another_thread_can_wake(host):
    question = host.ask(ACQUIRE)
    assert await host.held(question)
    await asyncio.to_thread(host.waits.wake_from_thread, TASK)
    assert await question == (200, b"")


@run
async def test_the_mark_tells_that_the_host_is_warm(host):
    assert await host.ask(MARK_PATH) == (204, b"")
    assert host.asked == []


@run
async def test_other_requests_and_their_bodies_pass_as_they_are(host):
    host.answers["/v1/runtime/get-nodes"] = (200, b"")
    assert await host.ask("/v1/runtime/get-nodes", b"x") == (200, b"")
