"""Why a data point is rejected: codes that exporters, logs and metrics see, and that stay."""

from enum import StrEnum


class Reason(StrEnum):
    """A stable code; the README says what each means."""

    NO_NODE = "no_node"
    INVALID_NODE = "invalid_node"
    TOO_MANY_NODES = "too_many_nodes"
    INVALID_TIME = "invalid_time"
    NO_VALUE = "no_value"
    NON_FINITE = "non_finite"
    UNSPECIFIED_TEMPORALITY = "unspecified_temporality"
    UNSUPPORTED_TYPE = "unsupported_type"
    INVALID_HISTOGRAM = "invalid_histogram"
    INCOMPLETE = "incomplete"
    TOO_OLD = "too_old"
