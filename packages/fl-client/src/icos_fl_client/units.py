"""What the units of metrics allow."""

import math

# Of what machines are measured in nothing is below 0, and a share is not above the whole.
_LIMITS = dict.fromkeys(("W", "MiB", "By", "kBy/s", "V", "A"), (0.0, math.inf))
_LIMITS["%"] = (0.0, 100.0)


def limits_of(unit: str) -> tuple[float, float]:
    """The least and the most that a value can be; of a count, such as ``{requests}``, 0 or more."""
    if unit.startswith("{"):
        return 0.0, math.inf
    return _LIMITS.get(unit, (-math.inf, math.inf))
