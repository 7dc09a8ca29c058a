"""The default model trained by a federation, by each node alone and on all rows pooled.

Nodes whose records overlap in time are cut at one moment: the earliest at which one of them has
CHOSEN_ON of its rows. No weights know of a later one. There is one model a metric and grid, as in a
run of ``icos-fl``: its ClientApp's training on the z-scores of each node's rows before the cut, the
mean of the weights by sequences, and the settings that a run has by default.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from icos_fl_client.forecasting import History
from icos_fl_client.forecasting.anchor_lstm import AnchorLSTM
from icos_fl_client.forecasting.history import GAP_STEPS_MAX
from icos_fl_client.forecasting.mixture import DISCOUNTS, Mixture
from icos_fl_client.models import build
from icos_fl_client.node import load_weights, weights_of
from icos_fl_client.training import train
from numpy.typing import NDArray
from replays import CHOSEN_ON, Array, Replay, Series, replay

KINDS = ("federated", "local", "pooled")
ROUNDS, EPOCHS, BATCH, LEARNING_RATE, LOOKBACK = 5, 3, 64, 0.002, 40
Weights = Mapping[str, NDArray[np.floating]]
Run = NDArray[np.float32]


@dataclass(frozen=True)
class Known:
    """What a node may learn from."""

    series: Series
    runs: list[Run]
    """z-scores (t, 1)."""
    deviation: float
    cut_s: float


def known(all_series: Sequence[Series]) -> list[Known]:
    """Each node's rows before the cut of its group."""
    groups: list[list[Series]] = []
    end_s = -np.inf
    for series in sorted(all_series, key=lambda each: float(each.time_s_t[0])):
        if series.time_s_t[0] > end_s:
            groups.append([])
        groups[-1].append(series)
        end_s = max(end_s, float(series.time_s_t[-1]))
    return [found for group in groups for found in _before_the_cut(group)]


def _before_the_cut(group: list[Series]) -> Iterator[Known]:
    cut_s = min(float(np.nanmax(s.time_s_t[s.row_share_t <= CHOSEN_ON])) for s in group)
    for series in group:
        values_t = np.where(series.time_s_t <= cut_s, series.values_t, np.nan)
        if np.isfinite(values_t).any():
            mean, deviation = float(np.nanmean(values_t)), float(np.nanstd(values_t)) or 1.0
            scores_t1 = ((values_t - mean) / deviation).astype(np.float32)[:, None]
            there = np.flatnonzero(np.isfinite(values_t))
            borders = np.flatnonzero(np.diff(there) > 1) + 1
            yield Known(
                series, [scores_t1[run] for run in np.split(there, borders)], deviation, cut_s
            )


def newcomers(
    of_metric: Sequence[Series], steps: int, seeds: Sequence[int]
) -> Iterator[tuple[Series, Replay, dict[str, tuple[Array, Array]]]]:
    """Each node as if it had come at the cut, new to a federation of the others.

    Yields its series and replay from then on and, for federations of 1, 2, 4 and all others, what
    the mixture with their model says (v, t, h), a variant a seed, and the model by itself.
    """
    everybody = known(of_metric)
    for place, new in enumerate(everybody):
        others = everybody[place + 1 :] + everybody[:place]
        series = after_the_cut(new)
        if not others or series is None:
            continue
        found = replay(series, steps)
        answer = {}
        for size in sorted({min(size, len(others)) for size in (1, 2, 4, len(others))}):
            label = "all others" if size == len(others) else f"{size} other{'s' * (size > 1)}"
            trained = [_federated(others[:size], steps, seed) for seed in seeds]
            # Of a new node no deviation is known yet; what counts as flat hardly depends on it.
            models = [AnchorLSTM(w, lookback=LOOKBACK, deviation=new.deviation) for w in trained]
            alone_vth = np.stack([said(series, model, steps) for model in models])
            answer[label] = remixed(found, alone_vth), alone_vth
        yield series, found, answer


def after_the_cut(node: Known) -> Series | None:
    """The rows of a node that come after those which it may learn from."""
    later = np.flatnonzero(node.series.time_s_t > node.cut_s)
    if not len(later):
        return None
    series = node.series
    of_t = (a[later[0] :] for a in (series.values_t, series.rows_t, series.time_s_t))
    return Series(series.node, series.metric, *of_t)


def compare(
    of_metric: Sequence[tuple[Series, Replay]], steps: int, seeds: Sequence[int]
) -> dict[str, tuple[Array, Array]]:
    """By node what the mixture with each model says (v, t, h), and the model by itself.

    The variants v are those of KINDS, each with every seed. A node without a row before the cut is
    left out.
    """
    nodes = known([series for series, _ in of_metric])
    replays = {series.node: found for series, found in of_metric}
    trained = [_weights(nodes, steps, seed) for seed in seeds]
    answer = {}
    for place, node in enumerate(nodes):
        models = [
            AnchorLSTM(of_seed[kind][place], lookback=LOOKBACK, deviation=node.deviation)
            for kind in KINDS
            for of_seed in trained
        ]
        alone_vth = np.stack([said(node.series, model, steps) for model in models])
        answer[node.series.node] = remixed(replays[node.series.node], alone_vth), alone_vth
    return answer


def _weights(nodes: list[Known], steps: int, seed: int) -> dict[str, list[Weights]]:
    """Of each kind, each node's."""
    everything = [run for node in nodes for run in node.runs]
    return {
        "federated": [_federated(nodes, steps, seed)] * len(nodes),
        "local": [_trained(node.runs, steps, seed) for node in nodes],
        "pooled": [_trained(everything, steps, seed)] * len(nodes),
    }


def _model(steps: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = {"features": 1, "hidden_size": 16, "num_layers": 1}
    return build("icos_fl_client.models:AnchorLSTM", lookback=LOOKBACK, horizon=steps, **sizes)


def _trained(runs: list[Run], steps: int, seed: int, start: Weights | None = None) -> Weights:
    model = _model(steps, seed)
    epochs = ROUNDS * EPOCHS
    if start is not None:
        load_weights(model, start)
        epochs = EPOCHS
    train(
        model,
        runs,
        lookback=LOOKBACK,
        horizon=steps,
        batch_size=BATCH,
        epochs=epochs,
        learning_rate=LEARNING_RATE,
        seed=seed,
    )
    return weights_of(model)


def _federated(nodes: list[Known], steps: int, seed: int) -> Weights:
    sequences_n = [sum(max(0, len(r) - LOOKBACK - steps + 1) for r in n.runs) for n in nodes]
    share_n = np.array(sequences_n) / sum(sequences_n)
    mean: Weights = weights_of(_model(steps, seed))
    for server_round in range(ROUNDS):
        round_seed = seed * ROUNDS + server_round
        replies = [_trained(node.runs, steps, round_seed, mean) for node in nodes]
        mean = {
            name: np.tensordot(share_n, np.stack([reply[name] for reply in replies]), 1)
            for name in mean
        }
    return mean


def said(series: Series, model: AnchorLSTM, steps: int) -> Array:
    """What a model says (t, h), NaN where it says nothing."""
    history, windows, places = History(), [], []
    for place, value in enumerate(series.values_t):
        history.append(value)
        window_l = history.newest(LOOKBACK)
        if len(window_l) == LOOKBACK and np.isfinite(value):
            windows.append(window_l.copy())
            places.append(place)
    said_th = np.full((len(series.values_t), steps), np.nan)
    said_th[places] = np.clip(model.predict(np.stack(windows)), *series.limits)
    return said_th


def remixed(found: Replay, models_vth: Array) -> Array:
    """The mixture (v, t, h) of a replay's forecasts and each of v models, as a combination's."""
    return np.stack([_remixed(found, model_th) for model_th in models_vth])


def _remixed(found: Replay, model_th: Array) -> Array:
    said_tkh = np.concatenate([found.said_tkh, model_th[:, None]], axis=1)
    count, forecasts, steps = said_tkh.shape
    step_h, every = np.arange(1, steps + 1), np.arange(steps)
    mixture = Mixture(forecasts, step_h)
    mixed_tmh = np.full((count, len(DISCOUNTS), steps), np.nan)
    mixture_th = np.full((count, steps), np.nan)
    for t in range(count):
        made_h = np.maximum(t - step_h, 0)
        actual_h = np.where(t >= step_h, found.actual_th[made_h, every], np.nan)
        if np.isfinite(actual_h).any():
            mixture.learn(
                said_tkh[made_h, :, every].T,
                mixed_tmh[made_h, :, every].T,
                mixture_th[made_h, every],
                actual_h,
            )
        if np.isfinite(said_tkh[t, 0, 0]):
            if t and np.isnan(found.said_tkh[max(0, t - GAP_STEPS_MAX - 1) : t, 0, 0]).all():
                mixture.begin_run()
            mixed_tmh[t], mixture_th[t] = mixture.mix(said_tkh[t])
    return mixture_th
