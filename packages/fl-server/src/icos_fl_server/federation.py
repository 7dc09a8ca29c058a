"""The rounds: one message a node for all metrics, one strategy a metric."""

import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from icos_fl.federation.v1 import records
from icos_fl_timeseries_store import ModelVersion, StoreError, connect

from icos_fl_server import nodes, strategies
from icos_fl_server.checkpoints import Checkpoint, Checkpoints, Weights, check_shapes, load_latest
from icos_fl_server.errors import ServerError
from icos_fl_server.history import Facts, History
from icos_fl_server.messages import (
    Failure,
    Numbers,
    Reply,
    exchange,
    from_record,
    request,
    to_record,
)
from icos_fl_server.settings import RunConfig
from icos_fl_server.tracking import Tracking

TTL_SLACK_SECONDS = 60.0

log = structlog.get_logger()


@dataclass
class Model:
    """The global model of one metric."""

    strategy: FedAvg
    weights: Weights
    round: int
    """That made these weights; counts on where a run resumes."""
    best_loss: float = math.inf


class Federation:
    """One run. Whatever ends it early is a ServerError."""

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        history: History,
        checkpoints: Checkpoints,
        tracking: Tracking,
    ) -> None:
        self._grid = grid
        self._config = config
        self._history = history
        self._checkpoints = checkpoints
        self._tracking = tracking
        self._names: dict[int, str] = {}
        self._offers: dict[int, dict[str, int]] = {}
        self._models: dict[str, Model] = {}
        self._first_round = 0
        self._choose = random.Random(config.seed)  # noqa: S311 - which nodes is no secret
        self._told: set[tuple[str, str]] = set()
        self._minimum = max(config.min_fit_clients, strategies.NODES_MIN.get(config.strategy, 1))

    def run(self) -> None:
        """All rounds, and the evaluation of the last one."""
        ids = nodes.wait_for_nodes(
            self._grid, self._config.min_available_clients, self._config.node_timeout
        )
        self._meet(ids, at_start=True)
        last: Facts | None = None
        aggregated = False
        for number in range(1, self._config.num_server_rounds + 1):
            last, finished = self._round(number, last)
            aggregated |= finished
        self._judge_last(last)
        if not aggregated:
            raise ServerError(f"no round had anything to learn from; {self._last_reason()}")

    def _meet(self, ids: Iterable[int], *, at_start: bool) -> None:
        """Ask nodes for their names, what they can learn from, and at the start for weights."""
        strangers = [node_id for node_id in ids if node_id not in self._names]
        if not strangers:
            return
        config = {"server-round": 0, "model-round": 0, "metrics": list(self._config.metric)}
        answers = self._exchange(
            [self._request(MessageType.QUERY, node_id, config, {}) for node_id in strangers]
        )
        replies: dict[str, Reply] = {}
        for node_id, answer in answers.items():
            if isinstance(answer, Failure):
                self._tell(str(node_id), answer.cause)
                self._history.node(str(node_id), {}, answer.cause)
                continue
            if at_start and answer.name in replies:
                raise ServerError(f"two nodes are named {answer.name!r}: names must differ")
            for old in [i for i, name in self._names.items() if name == answer.name]:
                del self._names[old]  # a SuperNode that was started again has a new id
            replies[answer.name] = answer
            self._names[node_id] = answer.name
            offer = {m: int(t.get(records.NUM_EXAMPLES, 0)) for m, t in answer.train.items()}
            self._offers[node_id] = offer
            cause = "; ".join(answer.causes.values())
            self._history.node(answer.name, offer, cause)
            if cause:
                self._tell(answer.name, cause)
        self._history.write()
        if at_start:
            self._take_first_weights(replies)

    def _take_first_weights(self, replies: dict[str, Reply]) -> None:
        """From the node that comes first by name, so that a run can be repeated."""
        for metric in self._config.metric:
            having = [name for name in sorted(replies) if metric in replies[name].weights]
            if not having:
                causes = {reply.causes.get(metric) for reply in replies.values()} - {None}
                why = "; ".join(sorted(map(str, causes))) or "no node answered"
                raise ServerError(f"no node can learn {metric!r}: {why}")
            weights = replies[having[0]].weights[metric]
            number = 0
            resumed = None
            if self._config.resume:
                resumed = load_latest(Path(self._config.resume), metric)
            if resumed is not None:
                check_shapes(f"checkpoint of {metric}", resumed.weights, weights)
                weights, number = resumed.weights, resumed.round
                log.info("resumed", metric=metric, round=number)
            strategy = strategies.make(self._config.strategy, self._config.proximal_mu)
            self._models[metric] = Model(strategy, weights, number)
            self._first_round = max(self._first_round, number)

    def _round(self, number: int, before: Facts | None) -> tuple[Facts, bool]:
        """One round; evaluation of the weights that it begins with goes to *before*."""
        entry = self._history.begin_round(number)
        self._meet(self._grid.get_node_ids(), at_start=False)
        messages, train_ids = self._configure(number)
        if len(train_ids) < self._minimum:
            raise ServerError(
                f"round {number}: {self._minimum} nodes are needed to train, "
                f"{len(train_ids)} are connected"
            )
        answers = self._exchange(messages)
        self._judge(before, answers)
        usable = self._usable(entry, answers, train_ids)
        self._stop_below_minimum(entry, train_ids)
        self._aggregate(entry, number, usable)
        if entry["metrics"]:
            self._history.end_round(entry, "finished")
        else:
            reason = "; ".join(f"{n}: {f['cause']}" for n, f in entry["nodes"].items())
            self._history.end_round(entry, "skipped", reason or "no node had anything to train on")
            log.warning("round skipped", round=number, reason=entry["reason"])
        return entry, bool(entry["metrics"])

    def _configure(self, number: int) -> tuple[list[Message], list[int]]:
        """One message a node: to train, to judge, or both."""
        config = self._config
        connected = [i for i in sorted(self._grid.get_node_ids()) if i in self._names]
        server = [i for i in connected if self._names[i] == config.server_node]
        others = [i for i in connected if i not in server]
        train_ids = nodes.sample(others, config.fraction_fit, self._minimum, self._choose)
        judge_ids = {*server}
        if config.fraction_evaluate > 0:
            judge_ids.update(
                nodes.sample(
                    others, config.fraction_evaluate, config.min_evaluate_clients, self._choose
                )
            )
        configs: dict[int, dict[str, Any]] = {i: {} for i in {*train_ids, *judge_ids}}
        arrays: dict[str, ArrayRecord] = {}
        for metric, model in self._models.items():
            arrays[metric] = to_record(model.weights)
            for message in model.strategy.configure_train(
                number,
                arrays[metric],
                ConfigRecord(),
                nodes.FixedNodes(train_ids, self._grid),
            ):
                strategy_config = message.content.config_records["config"]
                configs[message.metadata.dst_node_id].update(strategy_config)
        metrics = list(self._models)
        messages = []
        for node_id, node_config in configs.items():
            trains = node_id in train_ids
            node_config |= {
                "server-round": self._first_round + number,
                "model-round": self._first_round + number - 1,
                "metrics": metrics,
                "train-metrics": metrics if trains else [],
                "evaluate-metrics": metrics if node_id in judge_ids else [],
            }
            kind = MessageType.TRAIN if trains else MessageType.EVALUATE
            messages.append(self._request(kind, node_id, node_config, arrays))
        return messages, train_ids

    def _usable(
        self, entry: Facts, answers: dict[int, Reply | Failure], train_ids: list[int]
    ) -> dict[str, list[tuple[Weights, Numbers]]]:
        """What can be aggregated, by metric; each node's state and cause go into *entry*."""
        usable: dict[str, list[tuple[Weights, Numbers]]] = {m: [] for m in self._models}
        for node_id in train_ids:
            answer, name = answers[node_id], self._names[node_id]
            if isinstance(answer, Failure):
                entry["nodes"][name] = {"state": answer.state, "cause": answer.cause}
                self._tell(name, answer.cause)
                continue
            causes: dict[str, str] = {}
            good = empty = 0
            for metric in self._models:
                cause = self._why_unusable(answer, metric)
                if cause is None:
                    usable[metric].append((answer.weights[metric], answer.train[metric]))
                    good += 1
                elif cause == "":
                    empty += 1
                else:
                    causes[metric] = cause
            # A node that lacks a metric from the start takes part with those that it has.
            known = {m for m in causes if m not in self._offers[node_id]}
            state = "ok" if good else ("no-data" if set(causes) <= known else "unusable")
            shown = {m: c for m, c in causes.items() if not (good and m in known)}
            if not good and not shown and empty:
                shown = {"": "no sequence to train on"}
            cause_text = "; ".join(dict.fromkeys(shown.values()))
            entry["nodes"][name] = {"state": state, "cause": cause_text}
            if cause_text:
                self._tell(name, cause_text)
        return usable

    def _why_unusable(self, reply: Reply, metric: str) -> str | None:
        """None for usable, nothing for no examples, or the cause."""
        if metric in reply.causes:
            return reply.causes[metric]
        numbers = reply.train.get(metric)
        if numbers is None:
            return f"the reply has no record of training {metric}"
        examples = numbers.get(records.NUM_EXAMPLES)
        if examples is None or not np.isfinite(examples) or examples < 0:
            return f"{metric}: {records.NUM_EXAMPLES} is {examples}"
        if examples == 0:
            return ""
        if metric not in reply.weights:
            return f"the reply has no weights of {metric}"
        weights = reply.weights[metric]
        try:
            check_shapes(f"weights of {metric}", weights, self._models[metric].weights)
        except ServerError as error:
            return str(error)
        bad = [name for name, array in weights.items() if not np.isfinite(array).all()]
        return f"weights of {metric}: tensor {bad[0]!r} is not finite" if bad else None

    def _stop_below_minimum(self, entry: Facts, train_ids: list[int]) -> None:
        """Nodes without data are no fault; too few others are the end."""
        states = [entry["nodes"][self._names[node_id]]["state"] for node_id in train_ids]
        there = sum(state in ("ok", "no-data") for state in states)
        if there < self._minimum:
            causes = "; ".join(
                f"{name}: {facts['cause']}"
                for name, facts in entry["nodes"].items()
                if facts["state"] not in ("ok", "no-data")
            )
            raise ServerError(
                f"round {entry['round']}: {self._minimum} nodes are needed, {there} answered "
                f"usably; {causes}"
            )

    def _aggregate(
        self, entry: Facts, number: int, usable: dict[str, list[tuple[Weights, Numbers]]]
    ) -> None:
        for metric, model in self._models.items():
            replies = usable[metric]
            if len(replies) < strategies.NODES_MIN.get(self._config.strategy, 1):
                continue
            arrays, _ = model.strategy.aggregate_train(
                number, [_as_flower_expects(*reply) for reply in replies]
            )
            if arrays is None:
                continue
            # Back to the node's own types: a weighted mean of float32 may come out as float64.
            model.weights = {
                name: np.asarray(array, model.weights[name].dtype)
                for name, array in from_record(arrays).items()
            }
            model.round = self._first_round + number
            self._checkpoints.save(metric, Checkpoint(model.round, model.weights))
            entry["metrics"][metric] = {
                "train_loss": _weighted([numbers for _, numbers in replies], "train-loss"),
                "eval_loss": None,
                "mae": None,
                "naive_mae": None,
                "num_examples": int(sum(n[records.NUM_EXAMPLES] for _, n in replies)),
                "nodes": len(replies),
            }

    def _judge_last(self, last: Facts | None) -> None:
        """Send the final weights once more: to be judged, and to be kept by the nodes."""
        connected = [i for i in sorted(self._grid.get_node_ids()) if i in self._names]
        number = self._first_round + self._config.num_server_rounds
        metrics = list(self._models)
        judged = metrics if self._config.fraction_evaluate > 0 else []
        config = {
            "server-round": number,
            "model-round": number,
            "metrics": metrics,
            "evaluate-metrics": judged,
        }
        arrays = {metric: to_record(model.weights) for metric, model in self._models.items()}
        self._judge(
            last,
            self._exchange(
                [self._request(MessageType.EVALUATE, i, config, arrays) for i in connected]
            ),
        )
        self._history.write()

    def _judge(self, entry: Facts | None, answers: dict[int, Reply | Failure]) -> None:
        """Put what the nodes say of the weights that they received where it belongs."""
        if entry is None:
            return
        replies = {i: a for i, a in answers.items() if isinstance(a, Reply)}
        for metric, facts in entry["metrics"].items():
            of_nodes: list[Numbers] = []
            of_server: list[Numbers] = []
            for node_id, reply in replies.items():
                numbers = reply.evaluate.get(metric)
                if numbers and numbers.get(records.NUM_EXAMPLES, 0) > 0:
                    server = self._names.get(node_id) == self._config.server_node
                    (of_server if server else of_nodes).append(numbers)
            for key in ("eval-loss", "mae", "naive-mae"):
                facts[key.replace("-", "_")] = _weighted(of_nodes, key)
                if of_server:
                    facts[f"server_{key.replace('-', '_')}"] = _weighted(of_server, key)
            self._publish(metric, entry, facts)
        self._history.write()

    def _publish(self, metric: str, entry: Facts, facts: Facts) -> None:
        """Best checkpoint, model state, tracking: when a round's loss is known."""
        model = self._models[metric]
        loss = facts["eval_loss"]
        if loss is None:
            loss = facts.get("server_eval_loss", math.inf)
        best = loss < model.best_loss
        if best:
            model.best_loss = loss
            self._checkpoints.save_best(metric, Checkpoint(model.round, model.weights))
        self._tracking.round(metric, entry["round"], facts)
        self._keep(metric, model, facts, best=best)

    def _keep(self, metric: str, model: Model, facts: Facts, *, best: bool) -> None:
        settings = self._config.store
        if settings is None:
            return
        version = ModelVersion(
            round=model.round,
            weights=model.weights,
            config={},
            metadata={"created-unix-s": time.time()}
            | {key: value for key, value in facts.items() if value is not None},
        )
        try:
            with connect(settings) as store:
                store.model_state("server", metric).put(version, best=best)
        except StoreError as error:
            self._tell("server", f"model state not kept: {error}")

    def _exchange(self, messages: list[Message]) -> dict[int, Reply | Failure]:
        return exchange(self._grid, messages, self._config.round_timeout)

    def _request(
        self, kind: str, node_id: int, config: dict[str, Any], arrays: dict[str, ArrayRecord]
    ) -> Message:
        ttl = self._config.round_timeout + TTL_SLACK_SECONDS
        return request(kind, node_id, config, arrays, ttl)

    def _tell(self, name: str, cause: str) -> None:
        """Each node and cause once."""
        if (name, cause) not in self._told:
            self._told.add((name, cause))
            log.warning("node cannot take part fully", node=name, cause=cause)

    def _last_reason(self) -> str:
        return next(
            (r["reason"] for r in reversed(self._history.facts["rounds"]) if r["reason"]), ""
        )


def _weighted(replies: list[Numbers], key: str) -> float | None:
    """Mean of *key* weighted by examples, over the replies that have it and it is finite."""
    pairs = [
        (numbers[key], numbers[records.NUM_EXAMPLES])
        for numbers in replies
        if np.isfinite(numbers.get(key, np.nan))
    ]
    total = sum(weight for _, weight in pairs)
    return float(sum(value * weight for value, weight in pairs) / total) if total else None


def _as_flower_expects(weights: Weights, numbers: Numbers) -> Message:
    """One ArrayRecord and one MetricRecord with the weight alone: an extra key ends Flower's
    aggregation for all nodes."""
    content = RecordDict(
        {
            "arrays": to_record(weights),
            "metrics": MetricRecord({records.NUM_EXAMPLES: int(numbers[records.NUM_EXAMPLES])}),
        }
    )
    return Message(content=content, message_type=MessageType.TRAIN, dst_node_id=0)
