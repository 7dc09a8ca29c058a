from typing import Any

from icos_fl_local.run import describe


def history(*rounds: dict[str, Any], state: str = "running") -> dict[str, Any]:
    return {"state": state, "reason": "", "rounds_total": 5, "nodes": {}, "rounds": list(rounds)}


def a_round(number: int, state: str = "finished", **losses: float | None) -> dict[str, Any]:
    return {
        "round": number,
        "state": state,
        "reason": "",
        "metrics": {"cpu_usage": losses} if losses else {},
        "nodes": {},
    }


def test_before_the_first_round_the_nodes_are_waited_for() -> None:
    assert describe(history(state="waiting")) == "training: waiting for nodes"


def test_a_simulation_waits_for_ray() -> None:
    assert describe(history(state="waiting"), "Ray starts") == "Ray starts"


def test_a_round_that_runs_is_numbered() -> None:
    assert describe(history(a_round(1, "running"))) == "round 1 of 5: running"


def test_the_newest_known_loss_is_shown_with_its_round() -> None:
    rounds = (
        a_round(1, train_loss=0.9, eval_loss=0.8125),
        a_round(2, train_loss=0.7, eval_loss=None),
        a_round(3, "running"),
    )
    assert describe(history(*rounds)) == (
        "round 3 of 5: running, loss of round 1: cpu_usage 0.8125"
    )


def test_until_a_loss_comes_back_that_of_the_training_is_shown() -> None:
    assert describe(history(a_round(1, train_loss=0.5, eval_loss=None))) == (
        "round 1 of 5: finished, training loss: cpu_usage 0.5"
    )


def test_a_skipped_round_tells_why() -> None:
    skipped = a_round(2, "skipped") | {"reason": "no node has data"}
    assert describe(history(skipped)) == "round 2 of 5: skipped, no node has data"
