"""What keeps the bridge from starting, and why an export is refused as a whole."""


class ConfigError(Exception):
    """A configuration that cannot be used; a line a fault: file, line, key and what was read."""


class ExportRefused(Exception):
    """Base of what is wrong with a whole export. The store's own errors are a StoreError."""


class Undecodable(ExportRefused):
    """Bytes that are no request: no second attempt could succeed."""


class TooLarge(ExportRefused):
    """A request over the limit; the message names its size and the limit."""


class Overloaded(ExportRefused):
    """More than the bridge can hold at once. The same export may succeed later."""
