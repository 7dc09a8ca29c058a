"""``icos-fl forecast``: what the forecaster of a deployment says now."""

import json
import time
from collections.abc import Sequence
from typing import Any

from icos_fl_client.forecasting.intervals import ERRORS_MIN
from icos_fl_client.serving.settings import duration_text

from icos_fl_local.backtest.running import ForecasterClient

OLD_STEPS = 20
"""A forecast is not of now, such as one of recorded rows, whose rows ended so long ago."""
LEVELS = {0.8: "80", 0.95: "95"}


def tell(address: str, nodes: Sequence[str], *, as_json: bool) -> int:
    """Print it; the exit status is 1 where there is no forecast at all. Raises LocalError."""
    with ForecasterClient(address) as client:
        messages = client.forecasts(nodes)
    forecasts = [_plain(each) for each in messages if each.horizons]
    unavailable = [
        {"node": each.node, "metric": each.metric, "reason": each.none.message}
        for each in messages
        if not each.horizons
    ]
    if as_json:
        answer = {"forecasts": forecasts, "unavailable": unavailable}
        print(json.dumps(answer, allow_nan=False))
    else:
        for found in forecasts:
            print(_line(found))
        if any(None in found["lower_80"] for found in forecasts):
            print(
                f"no interval yet: fewer than {ERRORS_MIN} forecasts this far ahead have come "
                "to their end"
            )
        for found in unavailable:
            print(f"{found['node']}  {found['metric']}: none: {found['reason']}")
    return 0 if forecasts else 1


def _plain(message: Any) -> dict[str, Any]:
    """As ``icos-fl-client forecast`` prints it, with a place for each horizon instead of each step.

    Null is what is not known.
    """
    last_s = message.last_time.ToNanoseconds() / 1e9
    has_model = message.HasField("model")
    created = has_model and message.model.HasField("created")
    found = {
        "node": message.node,
        "metric": message.metric,
        "unit": message.unit,
        "round": message.model.round if has_model else None,
        "model_age_seconds": (
            time.time() - message.model.created.ToNanoseconds() / 1e9 if created else None
        ),
        "no_model": message.no_model,
        "interval_seconds": message.interval.ToNanoseconds() / 1e9,
        "last_time_unix_s": last_s,
        "last_value": message.last_value,
        "time_unix_s": [each.time.ToNanoseconds() / 1e9 for each in message.horizons],
        "yhat": [each.yhat for each in message.horizons],
    }
    for level, percent in LEVELS.items():
        for side in ("lower", "upper"):
            found[f"{side}_{percent}"] = [
                next((getattr(i, side) for i in each.intervals if i.level == level), None)
                for each in message.horizons
            ]
    return found


def _line(found: dict[str, Any]) -> str:
    parts = []
    for yhat, lower, upper, time_s in zip(
        found["yhat"], found["lower_80"], found["upper_80"], found["time_unix_s"], strict=True
    ):
        known = lower is not None
        interval = f"80 %: {_short(lower)} to {_short(upper)}" if known else "no interval yet"
        ahead = duration_text(round(time_s - found["last_time_unix_s"], 3))
        parts.append(f"in {ahead} {_short(yhat)} ({interval})")
    unit = f" {found['unit']}" if found["unit"] else ""
    last_s = found["last_time_unix_s"]
    is_old = time.time() - last_s > OLD_STEPS * found["interval_seconds"]
    when = time.strftime("on %F at %T", time.localtime(last_s)) if is_old else "now"
    value = f"{found['node']}  {found['metric']}: {when} {_short(found['last_value'])}{unit}"
    return "; ".join([value, *parts])


def _short(value: float) -> str:
    """Four digits that mean something, and no exponent."""
    return f"{float(f'{value:.4g}'):,.10g}"
