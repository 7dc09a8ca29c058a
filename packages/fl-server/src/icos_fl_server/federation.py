"""The rounds: one message a node for all metrics, one strategy a metric."""

import math
import random
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import structlog
from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from icos_fl.federation.v1 import records
from icos_fl.federation.v1.weights import Flat

from icos_fl_server import nodes, strategies
from icos_fl_server.checkpoints import Checkpoint, Checkpoints, difference, load_run
from icos_fl_server.errors import ServerError
from icos_fl_server.history import Facts, History
from icos_fl_server.messages import Failure, Models, Numbers, Reply, exchange, models_of, request
from icos_fl_server.model_state import ModelStates
from icos_fl_server.models import Model
from icos_fl_server.privacy import Privacy
from icos_fl_server.quiesce import Quiesced, Request
from icos_fl_server.settings import RunConfig
from icos_fl_server.tracking import Tracking
from icos_fl_server.usable import Sorted, extras, sort_reply, weighted

ROUNDS_BELOW_MAX = 3
"""Rounds in a row with fewer usable nodes than the minimum, until the run ends."""

Answers = dict[int, Reply | Failure]

log = structlog.get_logger()


class Federation:
    """One run. What ends it early is a ServerError, or Quiesced where it was asked to end."""

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        history: History,
        checkpoints: Checkpoints,
        tracking: Tracking,
        states: ModelStates,
        request: Request,
    ) -> None:
        self._grid = grid
        self._config = config
        self._history = history
        self._checkpoints = checkpoints
        self._tracking = tracking
        self._states = states
        self._request = request
        self._roster = nodes.Roster()
        self._models: dict[str, Model] = {}
        self._first_round = 0
        self._choose = random.Random(config.seed)  # noqa: S311 - which nodes is no secret
        self._told: set[tuple[str, str]] = set()
        self._of_nodes: dict[str, dict[str, Facts]] = {}
        """Of the newest round, by node and metric."""
        self._strategy_minimum = strategies.NODES_MIN.get(config.strategy, 1)
        self._minimum = max(config.min_fit_clients, self._strategy_minimum)
        self._rounds_below = 0
        self._privacy = Privacy(config) if config.is_private else None

    def run(self) -> None:
        """All rounds, and the evaluation of the last one."""
        config = self._config
        resumed = load_run(Path(config.resume), config.metric) if config.resume else {}
        if self._privacy:
            self._privacy.resume({metric: found.privacy for metric, found in resumed.items()})
        needed = max(config.min_available_clients, self._minimum + bool(config.server_node))
        ids = nodes.wait_for_nodes(self._grid, needed, config.node_timeout, self._request.look)
        self._begin(self._introduce(ids), resumed)
        last: Facts | None = None
        try:
            for number in range(1, config.num_server_rounds + 1):
                self._request.look()
                last = self._round(number, *self._present(), last)
        except Quiesced:
            if last:
                self._judge_last(last)
            raise
        self._judge_last(last)
        rounds = self._history.facts["rounds"]
        if all(entry["state"] == "skipped" for entry in rounds):
            raise ServerError(f"no round had anything to learn from: {rounds[-1]['reason']}")

    # Meeting nodes

    def _introduce(self, ids: Iterable[int]) -> dict[str, Reply]:
        """Ask nodes for their names and for what they can learn; who is silent is left out."""
        return self._admit(
            exchange(self._grid, [self._query(i, self._config.node_timeout) for i in ids])
        )

    def _query(self, node_id: int, timeout_seconds: float) -> Message:
        config = {"server-round": 0, "model-round": 0, "metrics": list(self._config.metric)}
        return request(MessageType.QUERY, node_id, config, timeout_seconds)

    def _admit(self, answers: Answers) -> dict[str, Reply]:
        """Who said a name of its own takes part from now on; the others' causes are kept."""
        connected = set(self._grid.get_node_ids()) | answers.keys()
        replies: dict[str, Reply] = {}
        for node_id, answer in answers.items():
            if isinstance(answer, Failure):
                name, offer, cause = f"id {node_id}", {}, answer.cause
            elif self._roster.admit(node_id, answer, connected):
                name, offer = answer.name, self._roster.offers[answer.name]
                cause = "; ".join(dict.fromkeys(answer.causes.values()))
                replies[name] = answer
            elif not self._models:
                raise ServerError(f"two nodes are named {answer.name!r}: names must differ")
            else:
                cause = f"another node is named {answer.name!r}"
                name, offer = f"id {node_id}", {}
            versions = answer.versions if isinstance(answer, Reply) else []
            self._history.node(name, node_id, offer, cause, versions)
            self._tell(name, cause)
        self._history.write()
        return replies

    def _begin(self, replies: dict[str, Reply], resumed: Mapping[str, Checkpoint]) -> None:
        """First weights of every metric. Raises ServerError for what no round could mend."""
        server = self._config.server_node
        if server and server not in replies:
            names = ", ".join(sorted(replies)) or "none"
            raise ServerError(f"server-node={server!r}: no such node; there are {names}")
        for metric in self._config.metric:
            having = sorted(name for name in replies if metric in replies[name].weights)
            if not having:
                raise ServerError(f"no node can learn {metric!r}; {self._offers(replies)}")
            learners = [name for name in having if name != server]
            if len(learners) < self._strategy_minimum:
                raise ServerError(
                    f"strategy {self._config.strategy} needs {self._strategy_minimum} nodes, "
                    f"{len(learners)} can learn {metric!r}"
                )
            # From the node that comes first by name, so that a run can be repeated.
            weights, number = replies[having[0]].weights[metric], 0
            if metric in resumed:
                found = resumed[metric]
                if cause := difference(found.weights.layout, weights.layout):
                    raise ServerError(f"resume: checkpoint of {metric}: {cause}")
                weights, number = found.weights.arranged(weights.layout), found.round
                log.info("resumed", metric=metric, round=number)
            plain = strategies.make(self._config.strategy, self._config.proximal_mu)
            strategy = self._privacy.protect(plain) if self._privacy else plain
            self._models[metric] = Model(strategy, weights, number)
            self._first_round = max(self._first_round, number)

    def _offers(self, replies: dict[str, Reply]) -> str:
        """What the nodes that were asked can do, or why they did not answer."""
        if not replies:
            facts = self._history.facts["nodes"]
            return "; ".join(f"{name}: {node['cause']}" for name, node in facts.items())
        return "; ".join(
            f"{name} offers {', '.join(sorted(reply.weights)) or 'none of the metrics'}"
            + "".join(f" ({cause})" for cause in dict.fromkeys(reply.causes.values()))
            for name, reply in sorted(replies.items())
        )

    def _present(self) -> tuple[list[int], list[int]]:
        """Connected nodes that have said who they are, and those that have not.

        Waits for enough of the former. Raises ServerError after node-timeout, and Quiesced.
        """
        deadline = time.monotonic() + self._config.node_timeout
        asked: set[int] = set()
        while True:
            connected = sorted(self._grid.get_node_ids())
            known = self._roster.known(connected)
            strangers = [i for i in connected if i not in known]
            if len(self._learners(known)) >= self._minimum:
                return known, strangers
            if new := [i for i in strangers if i not in asked]:
                asked.update(new)
                self._introduce(new)
            elif time.monotonic() >= deadline:
                raise ServerError(
                    f"{self._minimum} nodes needed to train, {len(self._learners(known))} there "
                    f"after {self._config.node_timeout:g} s (node-timeout)"
                )
            else:
                self._request.look()
                time.sleep(nodes.LOOK_SECONDS)

    def _learners(self, ids: Iterable[int]) -> list[int]:
        """The node at the server never trains."""
        return [i for i in ids if self._roster.names[i] != self._config.server_node]

    # One round

    def _round(
        self, number: int, known: list[int], strangers: list[int], before: Facts | None
    ) -> Facts:
        """One round; what is said of the weights that it begins with goes to *before*."""
        entry = self._history.begin_round(number)
        learners = self._learners(known)
        train_ids = nodes.sample(learners, self._config.fraction_fit, self._minimum, self._choose)
        messages = self._messages(number, train_ids, self._judges(known))
        asked = {message.metadata.dst_node_id for message in messages}
        # Who is new is asked along with the others, and trains from the next round on.
        timeout = min(self._config.node_timeout, self._config.round_timeout)
        answers = exchange(self._grid, messages + [self._query(i, timeout) for i in strangers])
        self._judge(before, {i: answers[i] for i in answers if i in asked})
        usable = self._sort(entry, answers, asked, train_ids)
        if strangers:
            self._admit({i: answers[i] for i in strangers})
        self._conclude(entry, number, usable, train_ids)
        return entry

    def _judges(self, known: list[int]) -> set[int]:
        """The node at the server always, and a share of the others."""
        learners = self._learners(known)
        judges = set(known) - set(learners)
        if self._config.fraction_evaluate > 0:
            share, minimum = self._config.fraction_evaluate, self._config.min_evaluate_clients
            judges.update(nodes.sample(learners, share, minimum, self._choose))
        return judges

    def _messages(self, number: int, train_ids: list[int], judges: set[int]) -> list[Message]:
        """One message a node: to train, to judge, or both."""
        configs: dict[int, dict[str, Any]] = {i: {} for i in [*train_ids, *sorted(judges)]}
        for model in self._models.values():
            for node_id, added in model.configure(number, train_ids, self._grid).items():
                configs[node_id].update(added)
        models = self._as_sent()
        messages = []
        for node_id, added in configs.items():
            trains = node_id in train_ids
            config = added | self._asked(number, trains=trains, judges=node_id in judges)
            kind = MessageType.TRAIN if trains else MessageType.EVALUATE
            messages.append(request(kind, node_id, config, self._config.round_timeout, models))
        return messages

    def _as_sent(self) -> Models:
        return models_of({metric: model.weights for metric, model in self._models.items()})

    def _asked(self, number: int, *, trains: bool, judges: bool) -> dict[str, Any]:
        metrics = list(self._models)
        return {
            "server-round": self._first_round + number,
            "model-round": max(model.round for model in self._models.values()),
            "metrics": metrics,
            "train-metrics": metrics if trains else [],
            "evaluate-metrics": metrics if judges else [],
        }

    def _sort(
        self, entry: Facts, answers: Answers, asked: set[int], train_ids: list[int]
    ) -> dict[str, list[tuple[Flat, Numbers]]]:
        """What can be aggregated, by metric; each node's state and cause go into *entry*."""
        usable: dict[str, list[tuple[Flat, Numbers]]] = {m: [] for m in self._models}
        expected = {metric: model.weights for metric, model in self._models.items()}
        for node_id in self._roster.known(asked):
            answer, name = answers[node_id], self._roster.names[node_id]
            if isinstance(answer, Failure):
                state, cause = answer.state, answer.cause
            elif node_id not in train_ids:
                state, cause = "ok", "; ".join(dict.fromkeys(answer.causes.values()))
            else:
                reply = sort_reply(answer, expected)
                for metric, pair in reply.usable.items():
                    usable[metric].append(pair)
                    self._say(name, metric, pair[1], "train-loss")
                state, cause = reply.state, self._cause(name, reply, extras(answer, expected))
            if isinstance(answer, Reply):  # a node may come back as another version
                self._history.facts["nodes"][name]["versions"] = answer.versions
            entry["nodes"][name] = {"state": state, "cause": cause}
            self._tell(name, cause)
        return usable

    def _cause(self, name: str, reply: Sorted, left_out: list[str]) -> str:
        """In one line what is wrong with a node's reply; nothing for what it never offered."""
        causes = list(reply.unusable.values())
        if reply.usable:
            offered = self._roster.offers[name]
            causes += [c for metric, c in reply.missing.items() if c and metric in offered]
        elif not reply.unusable:
            causes += [c or "nothing to train on" for c in reply.missing.values()]
        causes += [f"{extra} was not asked for and is left out" for extra in left_out]
        return "; ".join(dict.fromkeys(causes))

    def _conclude(
        self,
        entry: Facts,
        number: int,
        usable: dict[str, list[tuple[Flat, Numbers]]],
        train_ids: list[int],
    ) -> None:
        """Aggregate, or skip the round with its reason: the weights stay, the next one is tried."""
        of_trained = [entry["nodes"][self._roster.names[i]] for i in train_ids]
        # A node without data is no fault: it may have some in the next round.
        there = sum(node["state"] in ("ok", "no-data") for node in of_trained)
        causes = "; ".join(f"{n}: {f['cause']}" for n, f in entry["nodes"].items() if f["cause"])
        if there < self._minimum:
            self._rounds_below += 1
            reason = f"{self._minimum} nodes needed, {there} usable; {causes}"
            self._skip(entry, reason)
            if self._rounds_below == ROUNDS_BELOW_MAX:
                raise ServerError(f"{ROUNDS_BELOW_MAX} rounds in a row failed: {reason}")
            return
        self._rounds_below = 0
        without = [c for metric in usable if (c := self._aggregate(entry, number, metric, usable))]
        self._account(entry)
        if entry["metrics"]:
            self._history.end_round(entry, "finished", "; ".join(without))
            log.info(
                "round finished",
                round=number,
                metrics=entry["metrics"],
                **entry.get("privacy", {}),
            )
        else:
            self._skip(entry, causes or "; ".join(without))

    def _account(self, entry: Facts) -> None:
        if self._privacy:
            entry["privacy"] = self._privacy.spent()

    def _skip(self, entry: Facts, reason: str) -> None:
        self._account(entry)
        self._history.end_round(entry, "skipped", reason)
        log.warning("round skipped", round=entry["round"], reason=reason)

    def _aggregate(
        self,
        entry: Facts,
        number: int,
        metric: str,
        usable: dict[str, list[tuple[Flat, Numbers]]],
    ) -> str:
        """New weights of *metric* into its model; or the reason why there are none."""
        replies, model = usable[metric], self._models[metric]
        if len(replies) < self._strategy_minimum:
            return f"{metric}: {self._strategy_minimum} nodes needed, {len(replies)} usable"
        if cause := model.aggregate(number, self._first_round + number, replies):
            return f"{metric}: {cause}"
        self._checkpoints.save(metric, model.checkpoint)
        entry["metrics"][metric] = {
            "train_loss": weighted([numbers for _, numbers in replies], "train-loss"),
            "eval_loss": None,
            "mae": None,
            "naive_mae": None,
            "num_examples": int(sum(numbers[records.NUM_EXAMPLES] for _, numbers in replies)),
            "nodes": len(replies),
        }
        return ""

    # What the nodes say of the weights

    def _judge_last(self, last: Facts | None) -> None:
        """Send the final weights once more: to be judged, and to be kept by all nodes."""
        known = self._roster.known(self._grid.get_node_ids())
        judges = self._judges(known)
        models, number = self._as_sent(), self._config.num_server_rounds
        messages = []
        for node_id in known:
            config = self._asked(number, trains=False, judges=node_id in judges)
            timeout = self._config.round_timeout
            messages.append(request(MessageType.EVALUATE, node_id, config, timeout, models))
        answers = exchange(self._grid, messages)
        for node_id, answer in answers.items():
            if isinstance(answer, Failure):
                self._tell(self._roster.names[node_id], answer.cause)
        self._judge(last, answers)

    def _judge(self, entry: Facts | None, answers: Answers) -> None:
        """Put what the nodes say of the weights that they received where it belongs."""
        errors = "eval-loss", "mae", "naive-mae"
        for metric, facts in entry["metrics"].items() if entry else ():
            of_nodes: list[Numbers] = []
            of_server: list[Numbers] = []
            for node_id, answer in answers.items():
                if not isinstance(answer, Reply):
                    continue
                # A window too young to be judged says so with 0 examples: that is no evaluation.
                if answer.evaluate.get(metric, {}).get(records.NUM_EXAMPLES, 0) > 0:
                    name, numbers = self._roster.names[node_id], answer.evaluate[metric]
                    (of_server if name == self._config.server_node else of_nodes).append(numbers)
                    self._say(name, metric, numbers, *errors)
            if len(of_nodes) < self._config.min_evaluate_clients:
                self._tell(metric, f"{len(of_nodes)} nodes evaluated it, fewer than required")
                of_nodes = []
            for key in errors:
                name = key.replace("-", "_")
                facts[name] = weighted(of_nodes, key)
                if of_server:
                    facts[f"server_{name}"] = weighted(of_server, key)
            assert entry is not None
            self._publish(metric, entry["round"], facts)
        if entry:
            self._history.of_nodes(entry["round"], self._of_nodes)
        self._of_nodes = {}
        self._history.write()

    def _say(self, name: str, metric: str, numbers: Numbers, *keys: str) -> None:
        """Keep for the history what a node says of a metric; what is no number is left out."""
        said = {key.replace("-", "_"): numbers.get(key, math.nan) for key in keys}
        found = {key: value for key, value in said.items() if math.isfinite(value)}
        self._of_nodes.setdefault(name, {}).setdefault(metric, {}).update(found)

    def _publish(self, metric: str, number: int, facts: Facts) -> None:
        """Best checkpoint, model state and tracking, now that the round's loss is known."""
        model = self._models[metric]
        losses = (facts["eval_loss"], facts.get("server_eval_loss"))
        loss = next((loss for loss in losses if loss is not None), math.inf)
        best = loss < model.best_loss
        if best:
            model.best_loss = loss
            self._checkpoints.save_best(metric, model.checkpoint)
        self._tracking.round(metric, number, facts)
        self._states.put(metric, model.checkpoint, facts, best=best)

    def _tell(self, name: str, cause: str) -> None:
        """Each node and cause once."""
        if cause and (name, cause) not in self._told:
            self._told.add((name, cause))
            log.warning("cannot take part fully", node=name, cause=cause)
