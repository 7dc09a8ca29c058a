"""What the processor refuses; messages name value and limit. The servicer makes statuses of it."""


class ProcessorError(Exception):
    """Base of the processor's own errors."""


class InvalidSeries(ProcessorError):
    """A request that no window could answer."""


class UnknownColumn(ProcessorError):
    """A column that the node's window does not have."""

    def __init__(self, node: str, column: str, columns: tuple[str, ...]) -> None:
        known = ", ".join(columns) or "none"
        super().__init__(f"node {node!r} has no column {column!r}; its columns: {known}")


class StepTooShort(ProcessorError):
    """Steps so short that some would be empty between any two rows."""

    def __init__(self, interval_ns: int, distance_ns: int) -> None:
        super().__init__(
            f"a step of {interval_ns / 1e9:g} s is shorter than the median distance of the rows,"
            f" {distance_ns / 1e9:g} s; ask for at least that, or for 0 to take it"
        )


class TooFewRows(ProcessorError):
    """The window holds too little; more rows cure it."""


class ColumnUnavailable(ProcessorError):
    """A column whose sensor cannot be read now: its newest values are no measurements."""


class TooManyWatchers(ProcessorError):
    """All places for calls that wait are taken."""
