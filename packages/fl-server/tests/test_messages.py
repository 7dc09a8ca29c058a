"""Sending and receiving: at which pace replies are asked for, and until when."""

from dataclasses import dataclass, field

import pytest
from icos_fl_server import messages
from icos_fl_server.messages import TTL_SLACK_SECONDS, Failure, Reply, exchange, request
from icos_fl_warm_runtime import pace


@dataclass
class SuperLink:
    """Nodes behind a SuperLink that takes its time; a clock that goes on only with it."""

    nodes: object
    sending_seconds: float = 0.0
    empty_seconds: list[float] = field(default_factory=list)
    """So many first answers are empty, and take so long."""
    now: float = 0.0
    asked: list[float] = field(default_factory=list)

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds

    def push_messages(self, messages):
        self.now += self.sending_seconds
        return self.nodes.push_messages(messages)

    def pull_messages(self, message_ids):
        self.asked.append(self.now)
        if self.empty_seconds:
            self.now += self.empty_seconds.pop(0)
            return []
        return self.nodes.pull_messages(message_ids)


@pytest.fixture
def superlink(make_grid, make_node, silent, monkeypatch):
    """Of nodes by name, with ids from 101; who is named mute never replies."""

    def raises(_node, _reply):
        raise silent()

    def make(*names, **facts):
        nodes = [make_node(name, introduce=raises if name == "mute" else None) for name in names]
        link = SuperLink(make_grid(nodes), **facts)
        for module in (messages, pace):
            monkeypatch.setattr(module, "time", link)
        return link

    return make


def query(node_id, timeout_seconds):
    asked = {"server-round": 0, "model-round": 0, "metrics": ["cpu_usage"]}
    return request("query", node_id, asked, timeout_seconds)


def test_a_message_lives_a_little_longer_than_its_own_timeout():
    assert query(101, 30.0).metadata.ttl == 30.0 + TTL_SLACK_SECONDS


def test_quick_empty_answers_double_the_pause_up_to_a_second(superlink):
    link = superlink("mute")
    exchange(link, [query(101, 4.0)])
    expected = [0, 0.02, 0.06, 0.14, 0.3, 0.62, 1.26, 2.26, 3.26, 4.0]
    assert link.asked == pytest.approx(expected)


def test_after_an_answer_that_was_held_it_is_asked_again_at_once(superlink):
    link = superlink("a", empty_seconds=[20.0, 20.0])
    answers = exchange(link, [query(101, 60.0)])
    assert link.asked == [0, 20, 40]
    assert isinstance(answers[101], Reply)


def test_a_held_answer_resets_the_pause(superlink):
    link = superlink("a", empty_seconds=[0.1, 0.1, 0.5, 0.1])
    exchange(link, [query(101, 60.0)])
    assert link.asked == pytest.approx([0, 0.12, 0.26, 0.76, 0.88])


def test_a_reply_resets_the_pause(superlink):
    link = superlink("a", "mute", empty_seconds=[0.0, 0.0])
    exchange(link, [query(101, 0.25), query(102, 0.25)])
    # Two empty answers, the reply, at once another one, and 20 ms, 40 ms, 80 ms and what is left.
    assert link.asked == pytest.approx([0, 0.02, 0.06, 0.06, 0.08, 0.12, 0.2, 0.25])


def test_each_node_is_silent_at_its_own_timeout(superlink):
    link = superlink("mute", "mute")
    answers = exchange(link, [query(101, 0.1), query(102, 0.4)])
    assert answers == {
        101: Failure("silent", "no reply in 0.1 s"),
        102: Failure("silent", "no reply in 0.4 s"),
    }
    assert link.now == pytest.approx(0.4)


def test_the_time_that_sending_takes_is_part_of_the_timeout(superlink):
    link = superlink("mute", sending_seconds=0.3)
    exchange(link, [query(101, 0.4)])
    assert link.now == pytest.approx(0.4)


def test_a_timeout_is_outlasted_by_one_held_answer_at_most(superlink):
    link = superlink("a", empty_seconds=[20.0])
    assert exchange(link, [query(101, 5.0)])[101] == Failure("silent", "no reply in 5 s")
    assert link.asked == [0]
