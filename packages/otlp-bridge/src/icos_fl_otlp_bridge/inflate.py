"""gzip that is never inflated beyond a limit: a few kilobytes can hold gigabytes."""

import zlib
from typing import Final

from icos_fl_otlp_bridge.errors import TooLarge, Undecodable

_GZIP_WINDOW_BITS: Final = 31
_CHUNK_BYTES: Final = 1 << 20


def gunzip(compressed: bytes, max_bytes: int) -> bytes:
    """What the one gzip member *compressed* holds. Raises Undecodable, TooLarge."""
    inflating = zlib.decompressobj(_GZIP_WINDOW_BITS)
    try:
        inflated = inflating.decompress(compressed, max_bytes + 1)
        if len(inflated) > max_bytes:
            size_bytes, whole = _counted(inflating, len(inflated), 2 * max_bytes)
            raise TooLarge(
                f"the request's {'' if whole else 'more than '}{size_bytes} bytes after "
                f"decompression are over the limit of {max_bytes}"
            )
        inflated += inflating.flush()
    except zlib.error as error:
        raise Undecodable(f"{len(compressed)} bytes are not gzip: {error}") from None
    if not inflating.eof:
        raise Undecodable(f"the gzip of {len(compressed)} bytes ends in mid-stream")
    if inflating.unused_data:
        raise Undecodable(f"{len(inflating.unused_data)} bytes follow the end of the gzip")
    return inflated


def _counted(inflating: "zlib._Decompress", size_bytes: int, enough_bytes: int) -> tuple[int, bool]:
    """The size, counted on to *enough_bytes* without keeping it, and whether that is all of it."""
    while not inflating.eof and size_bytes <= enough_bytes:
        more = len(inflating.decompress(inflating.unconsumed_tail, _CHUNK_BYTES))
        if not more and not inflating.eof:
            break
        size_bytes += more
    return size_bytes, inflating.eof
