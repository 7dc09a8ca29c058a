"""What the small cache keeps, and what it makes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from icos_fl_processor.recent import Recent


def test_a_value_is_made_once():
    made = []
    recent = Recent[str](100, 9, len)
    for _ in range(2):
        assert recent.get(("key", 1), lambda: made.append(1) or "value") == "value"
    assert len(made) == 1


def test_the_least_recently_used_goes_when_the_bytes_are_full():
    recent = Recent[str](4, 9, len)
    recent.get(("a", 1), lambda: "aa")
    recent.get(("b", 1), lambda: "bb")
    recent.get(("a", 1), lambda: "not made")
    recent.get(("c", 1), lambda: "cc")
    assert recent.get(("a", 1), lambda: "made anew") == "aa"
    assert recent.get(("b", 1), lambda: "made anew") == "made anew"


def test_a_value_larger_than_the_cache_is_given_and_not_kept():
    recent = Recent[str](2, 9, len)
    assert recent.get(("a", 1), lambda: "aaa") == "aaa"
    assert recent.get(("a", 1), lambda: "a") == "a"


def test_a_failure_is_not_kept():
    recent = Recent[str](10, 9, len)
    with pytest.raises(ZeroDivisionError):
        recent.get(("a", 1), lambda: str(1 / 0))
    assert recent.get(("a", 1), lambda: "value") == "value"


def test_threads_that_ask_at_once_wait_for_one_value():
    recent = Recent[str](10, 9, len)
    made = []
    all_there = threading.Barrier(4)

    def ask() -> str:
        all_there.wait()
        return recent.get(("a", 1), lambda: made.append(1) or "value")

    with ThreadPoolExecutor(4) as pool:
        assert [future.result() for future in [pool.submit(ask) for _ in range(4)]] == ["value"] * 4
    assert len(made) == 1


def test_of_one_thing_the_versions_used_last_are_kept():
    recent = Recent[str](100, 2, len)
    recent.get(("a", 1), lambda: "first")
    recent.get(("b", 1), lambda: "other")
    recent.get(("a", 2), lambda: "second")
    recent.find(("a", 1))
    recent.get(("a", 3), lambda: "third")

    kept = [recent.find(key) for key in [("a", 1), ("a", 2), ("a", 3), ("b", 1)]]

    assert kept == ["first", None, "third", "other"]
