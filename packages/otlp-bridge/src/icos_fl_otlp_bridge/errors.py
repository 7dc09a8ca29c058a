"""What keeps the bridge from starting."""


class ConfigError(Exception):
    """A configuration that cannot be used; a line a fault: file, line, key and what was read."""


class ListenError(Exception):
    """An address that cannot be listened on; the message names it."""
