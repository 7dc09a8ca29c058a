"""How the rehearsal judges what goes over a network."""

import struct
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "deploy/rehearsal"))

from capture import Traffic, not_tls

HELLO = b"\x16\x03\x01\x00\x02ab"
DATA = b"\x17\x03\x03\x00\x03abc"
SYN, ACK = 0x02, 0x10


def frame(payload: bytes, sequence: int, flags: int = ACK, protocol: int = 6) -> bytes:
    segment = struct.pack("!HHIIBBHHH", 1000, 8443, sequence, 0, 5 << 4, flags, 0, 0, 0) + payload
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(segment), 0, 0, 64, protocol, 0, b"abcd", b"efgh"
    )
    return b"\0" * 12 + b"\x08\x00" + head + segment


def judged(*frames: bytes) -> list[str]:
    return Traffic.of([frame(b"", 99, SYN), *frames]).what_is_not_tls()


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (HELLO + DATA, None),
        (HELLO + DATA[:4], None),
        (HELLO + DATA[:-1], None),
        (b"", None),
        (b"GET / HTTP/1.1\r\n\r\n", 0),
        (HELLO + b"cpu_usage", 7),
        (b"\x17\x02\x03\x00\x01a", 0),
        (b"\x17\x03\x03\xff\xff", 0),
    ],
)
def test_data_is_tls_up_to_where_it_is_not(data, place):
    assert not_tls(data) == place


def test_segments_are_put_in_order_and_what_comes_twice_counts_once():
    stream = HELLO + DATA
    assert judged(frame(stream[4:], 104), frame(stream[:6], 100), frame(stream[:6], 100)) == []


def test_what_is_no_tls_is_found_behind_what_is():
    found = judged(frame(HELLO, 100), frame(b"cpu_usage 97.25", 107))
    assert found == ["97.98.99.100:1000 > 101.102.103.104:8443: no TLS at byte 7"]


def test_a_missing_segment_is_no_proof_of_tls():
    found = judged(frame(DATA, 107))
    assert found == ["97.98.99.100:1000 > 101.102.103.104:8443: not all of it was seen"]


def test_a_connection_from_before_the_capture_is_told():
    found = Traffic.of([frame(HELLO, 100)]).what_is_not_tls()
    assert found == ["97.98.99.100:1000 > 101.102.103.104:8443: not all of it was seen"]


def test_another_protocol_is_told():
    assert judged(frame(b"", 100, protocol=132)) == ["IP protocol 132"]


def test_ports_that_are_used_again_are_another_connection():
    assert judged(frame(HELLO, 100), frame(b"", 4999, SYN), frame(HELLO, 5000)) == []
    found = judged(frame(b"cpu_usage", 100), frame(b"", 4999, SYN), frame(HELLO, 5000))
    assert found == ["97.98.99.100:1000 > 101.102.103.104:8443: no TLS at byte 0"]


def test_a_refusal_is_no_connection():
    assert judged(frame(b"", 0, 0x14)) == []
    assert Traffic.of([frame(b"", 0, 0x14)]).what_is_not_tls() == []


def test_how_hosts_find_each_other_is_counted():
    listener = (
        b"\0" * 12 + b"\x86\xdd" + b"\x60\0\0\0\0\x24\0\x01" + b"\0" * 32 + b"\x3a\0" + b"\0" * 34
    )
    asked = b"\0" * 12 + b"\x08\x06" + b"\0" * 28
    traffic = Traffic.of([listener, asked])
    assert traffic.what_is_not_tls() == []
    assert traffic.others == {"ICMP": 1, "ARP": 1}
