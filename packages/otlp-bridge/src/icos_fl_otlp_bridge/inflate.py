"""gzip that is never inflated beyond a limit: a few kilobytes can hold gigabytes."""

import zlib
from collections.abc import Iterator
from typing import Final

from icos_fl_otlp_bridge.errors import TooLarge, Undecodable

_GZIP_WINDOW_BITS: Final = 31
_PIECE_BYTES: Final = 64 << 10
_CHUNK_BYTES: Final = 1 << 20


def gunzip(compressed: bytes, max_bytes: int) -> bytes:
    """What the one gzip member *compressed* holds. Raises Undecodable, TooLarge.

    Of what is over the limit nothing is kept; it is counted to twice as much.
    """
    kept: list[bytes] = []
    size_bytes, more_than = 0, ""
    try:
        for chunk in _chunks(compressed):
            size_bytes += len(chunk)
            if size_bytes > 2 * max_bytes:
                more_than = "more than "
                break
            if size_bytes <= min(said_bytes(compressed), max_bytes):
                kept.append(chunk)
            else:  # too large, or the end will not be what is said
                kept.clear()
    except zlib.error as error:
        raise Undecodable(f"{len(compressed)} bytes are not gzip: {error}") from None
    if size_bytes > max_bytes:
        raise TooLarge(
            f"the request's {more_than}{size_bytes} bytes after decompression are over the limit "
            f"of {max_bytes}"
        )
    return b"".join(kept)


def said_bytes(compressed: bytes) -> int:
    """The size after decompression that gzip ends with. If it is not true, the gzip is broken."""
    return int.from_bytes(compressed[-4:], "little")


def _chunks(compressed: bytes) -> Iterator[bytes]:
    """Raises Undecodable, zlib.error."""
    inflating = zlib.decompressobj(_GZIP_WINDOW_BITS)
    end = 0
    while end < len(compressed) and not inflating.eof:
        piece = compressed[end : end + _PIECE_BYTES]
        end += len(piece)
        while piece and not inflating.eof:
            yield inflating.decompress(piece, _CHUNK_BYTES)
            piece = inflating.unconsumed_tail
    yield inflating.flush()
    if not inflating.eof:
        raise Undecodable(f"the gzip of {len(compressed)} bytes ends in mid-stream")
    unused_bytes = len(inflating.unused_data) + len(compressed) - end
    if unused_bytes:
        raise Undecodable(f"{unused_bytes} bytes follow the end of the gzip")
