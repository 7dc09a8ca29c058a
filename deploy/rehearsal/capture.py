"""What goes over a network of containers, and whether it is TLS. Needs root, to listen."""

import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np

_ETH_P_ALL = 0x0003
_SO_RCVBUFFORCE = 33
_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, _PACKET_STATISTICS, _PACKET_MR_PROMISC = 263, 1, 6, 1
_ARP, _IPV4, _IPV6 = 0x0806, 0x0800, 0x86DD
_HOP_BY_HOP, _ICMP, _TCP, _UDP, _ICMPV6 = 0, 1, 6, 17, 58
_DNS = 53
_TLS_RECORDS = range(20, 25)
_TLS_RECORD_BYTES_MAX = 16384 + 256
_NUMBER: Final = np.dtype("<u8")


class Capture:
    """All frames on the bridge *interface*, from entering to leaving."""

    def __init__(self, interface: str) -> None:
        self.frames: list[bytes] = []
        self.lost = 0
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 * 2**20)
        self._socket.bind((interface, 0))
        # Else a bridge shows what is its own alone, and not what goes from port to port.
        index = socket.if_nametoindex(interface)
        request = struct.pack("iHH8s", index, _PACKET_MR_PROMISC, 0, b"")
        self._socket.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, request)
        self._socket.settimeout(0.2)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        statistics = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        self.lost = struct.unpack("II", statistics)[1]
        self._socket.close()

    def _listen(self) -> None:
        while not self._stopping.is_set():
            try:
                self.frames.append(self._socket.recv(2**18))
            except TimeoutError:
                continue

    def holds(self, patterns: Iterable[bytes]) -> list[bytes]:
        """Those of *patterns* that are somewhere in it, also where packets divide them."""
        streams = [stream.data() for stream in Traffic.of(self.frames).streams.values()]
        everything = b"\0".join([*self.frames, *streams])
        wanted = {*patterns}
        numbers = {pattern for pattern in wanted if len(pattern) == _NUMBER.itemsize}
        return [
            *(one for one in wanted - numbers if one in everything),
            *_seen(numbers, everything),
        ]


def _seen(numbers: set[bytes], data: bytes) -> Iterator[bytes]:
    """Thousands of *numbers* in megabytes: of *data*, at each place, eight bytes are looked up."""
    wanted = np.frombuffer(b"".join(numbers), _NUMBER)
    found = [
        np.intersect1d(np.frombuffer(data, _NUMBER, (len(data) - shift) // 8, shift), wanted)
        for shift in range(min(8, len(data)))
    ]
    for number in np.unique(np.concatenate([wanted[:0], *found])):
        yield number.tobytes()


@dataclass
class Stream:
    """One direction of a TCP connection."""

    first: int = -1
    """The number of its first byte; -1 until its begin is seen."""
    segments: dict[int, bytes] = field(default_factory=dict)

    def data(self) -> bytes:
        """Its bytes in order, as far as none is missing."""
        data = bytearray()
        for place, segment in sorted(self.segments.items()):
            if place > len(data):
                break
            data += segment[len(data) - place :]
        return bytes(data)

    @property
    def seen(self) -> bool:
        """Was all of it? An end that says nothing, as one that refuses, has no begin."""
        ends = [place + len(segment) for place, segment in self.segments.items()]
        return not ends or (self.first >= 0 and len(self.data()) == max(ends))


@dataclass
class Traffic:
    """What frames are of."""

    streams: dict[tuple[Any, ...], Stream]
    """By the two ends, each address and port, and a number where they were used before."""
    others: dict[str, int]
    """How many frames are no TCP, by what they are."""

    @classmethod
    def of(cls, frames: Sequence[bytes]) -> Self:
        traffic = cls(defaultdict(Stream), defaultdict(int))
        for frame in frames:
            traffic._add(frame)
        return traffic

    def _add(self, frame: bytes) -> None:
        kind = int.from_bytes(frame[12:14])
        if kind == _IPV4:
            head = 14 + 4 * (frame[14] & 0x0F)
            protocol, ends = frame[23], (frame[26:30], frame[30:34])
            packet = frame[head : 14 + int.from_bytes(frame[16:18])]
        elif kind == _IPV6:
            protocol, ends, packet = frame[20], (frame[22:38], frame[38:54]), frame[54:]
            if protocol == _HOP_BY_HOP:  # as hosts tell switches what they listen to
                protocol = packet[0]
        else:
            self.others["ARP" if kind == _ARP else f"ethertype {kind:#06x}"] += 1
            return
        if protocol == _TCP:
            self._add_segment(ends, packet)
        elif protocol == _UDP and _DNS in struct.unpack_from("!HH", packet):
            self.others["DNS"] += 1
        elif protocol in (_ICMP, _ICMPV6):
            self.others["ICMP"] += 1
        else:
            self.others[f"IP protocol {protocol}"] += 1

    def _add_segment(self, ends: tuple[bytes, bytes], segment: bytes) -> None:
        sequence, flags = int.from_bytes(segment[4:8]), segment[13]
        key = (ends[0] + segment[:2], ends[1] + segment[2:4])
        if flags & 0x02:  # SYN
            first = (sequence + 1) % 2**32
            if self.streams[key].first not in (-1, first):  # the ports are used again
                self.streams[*key, len(self.streams)] = self.streams.pop(key)
            self.streams[key].first = first
        stream = self.streams[key]
        payload = segment[4 * (segment[12] >> 4) :]
        if payload:
            place = (sequence - stream.first) % 2**32
            if len(payload) > len(stream.segments.get(place, b"")):
                stream.segments[place] = payload

    def what_is_not_tls(self) -> list[str]:
        """A line for each stream that is no TLS, and each kind of frame that is out of place."""
        found = [kind for kind in self.others if kind not in ("ARP", "DNS", "ICMP")]
        for (source, target, *_), stream in self.streams.items():
            if not stream.seen:
                found.append(f"{_end(source)} > {_end(target)}: not all of it was seen")
            elif (place := not_tls(stream.data())) is not None:
                found.append(f"{_end(source)} > {_end(target)}: no TLS at byte {place}")
        return found


def not_tls(data: bytes) -> int | None:
    """Where *data* is no TLS record; None where all are, of which the last may be cut off."""
    place = 0
    while place < len(data):
        kind, major, _, length = struct.unpack("!BBBH", data[place : place + 5].ljust(5, b"\0"))
        if len(data) - place < 5:
            return None
        if kind not in _TLS_RECORDS or major != 3 or not 0 < length <= _TLS_RECORD_BYTES_MAX:
            return place
        place += 5 + length
    return None


def _end(end: bytes) -> str:
    family = socket.AF_INET if len(end) == 6 else socket.AF_INET6
    return f"{socket.inet_ntop(family, end[:-2])}:{int.from_bytes(end[-2:])}"
