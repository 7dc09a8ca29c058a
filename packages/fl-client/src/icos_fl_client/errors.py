"""Why a node cannot take part, each in one sentence."""


class ClientError(Exception):
    """Base of the client's errors; the message is for people."""


class ConfigError(ClientError):
    """A setting that cannot be used; the message has its key, its value and the limit."""


class NoSequences(ClientError):
    """The node has nothing to learn the metric from: no such column, or too few rows."""


class ProcessorUnavailable(ClientError):
    """The processor does not answer now."""


class WrongWeights(ClientError):
    """Weights that the model cannot take; the message names the tensor, and shapes that differ."""


class NotFinite(ClientError):
    """A model whose forecasts are not all numbers, so that none of them can be judged."""
