"""Why a run ends before its last round."""


class ServerError(Exception):
    """A run that cannot go on; the message is one sentence for people."""
