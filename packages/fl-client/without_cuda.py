#!/usr/bin/env python3
"""Takes out of PyPI's torch what only a GPU uses, in place: ``without_cuda.py SITE-PACKAGES``.

PyPI has no CPU build of torch for Linux x86-64, and its CUDA build takes 5 GB with what it depends
on. A process without a GPU calls nothing of all that but libcudart, which tells it that there is
none. Yet the loader wants every library by name and with its symbols. So

- one small library takes the place of NVIDIA's, where they are not installed: it has the symbols
  that torch asks for, and each function says that it was called, and aborts;
- the machine code for GPUs is cut out of torch's own libraries; where it was, memory is zero.

Needs readelf and gcc. torch then says what it says on any machine without a driver: no CUDA.
"""

import re
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ON_DEMAND = ("libtorch_cuda_linalg.so", "libcaffe2_nvrtc.so")
"""Libraries of torch that only a call for a GPU loads."""
UNVERSIONED = ("cuFile", "cusparseLt", "nccl", "nvshmem_")
"""What functions are called, of NVIDIA's libraries that give their symbols no version."""
ABSENT = r"""
#include <stdio.h>
#include <stdlib.h>
__attribute__((visibility("hidden"))) void absent(const char *function) {
    fprintf(stderr, "%s was called, but this torch is without CUDA (without_cuda.py)\n", function);
    abort();
}
"""
PAGE = 4096
PT_LOAD, PT_NOTE = 1, 4
HEADER = struct.Struct("<16s2HI3QI6H")
"""Of a 64-bit ELF file; [5] is where the program headers begin, [10] how many there are, and [6],
[12] and [13] are about the table of sections."""
SEGMENT = struct.Struct("<2I6Q")


class Segment(NamedTuple):
    """A program header of a 64-bit ELF file."""

    kind: int
    flags: int
    offset: int
    address: int
    physical_address: int
    file_bytes: int
    memory_bytes: int
    alignment: int


def main(folder: Path) -> None:
    """*folder* is torch/lib."""
    for name in ON_DEMAND:
        (folder / name).unlink()
    libraries = list(folder.glob("*.so*"))
    replace_missing(folder, libraries)
    for library in libraries:
        cut(library, ".nv_fatbin")


def replace_missing(folder: Path, libraries: list[Path]) -> None:
    """Put libno_cuda.so into *folder*, and a link to it for each of NVIDIA's libraries."""
    missing: set[str] = set()
    symbols: dict[str, tuple[str, str]] = {}
    for library in libraries:
        needed = re.findall(r"NEEDED.*\[(lib(?:cu(?!dart)|nccl|nv).+)\]", readelf("-d", library))
        missing |= set(needed)
        versions = versions_wanted(library, set(needed))
        for line in readelf("--dyn-syms", library).splitlines():
            match line.split():
                case [_, _, _, kind, _, _, "UND", name, *_]:
                    symbol, _, version = name.partition("@")
                    if version in versions or (not version and symbol.startswith(UNVERSIONED)):
                        symbols[symbol] = (kind, version)
    write_library(folder / "libno_cuda.so", symbols)
    for name in missing:
        (folder / name).symlink_to("libno_cuda.so")
    print(f"{len(symbols)} symbols of {', '.join(sorted(missing))} lead nowhere")


def versions_wanted(library: Path, of: set[str]) -> set[str]:
    """The versions of symbols that *library* wants of the libraries *of*."""
    versions, wanted = set(), False
    for what, name in re.findall(r"(File|Name): (\S+)", readelf("-V", library)):
        if what == "File":
            wanted = name in of
        elif wanted:
            versions.add(name)
    return versions


def write_library(path: Path, symbols: dict[str, tuple[str, str]]) -> None:
    """A shared library with *symbols*, whose kind (readelf's) and version are given."""
    assembly, versions = [], defaultdict(list)
    for symbol, (kind, version) in symbols.items():
        versions[version].append(symbol)
        if kind == "OBJECT":
            body = f".data\n.type {symbol}, @object\n.size {symbol}, 8\n{symbol}: .quad 0\n"
        else:
            body = f'.section .rodata\n1: .asciz "{symbol}"\n.text\n.type {symbol}, @function\n'
            body += f"{symbol}: lea 1b(%rip), %rdi\njmp absent\n"
        assembly.append(f".globl {symbol}\n{body}")
    versions.pop("", None)
    with tempfile.TemporaryDirectory() as work:
        source, absent, script = (Path(work, name) for name in ("all.s", "absent.c", "versions"))
        source.write_text("".join(assembly) + '.section .note.GNU-stack,"",@progbits\n')
        absent.write_text(ABSENT)
        nodes = [f"{name} {{ {'; '.join(its)}; }};\n" for name, its in versions.items()]
        script.write_text("".join(nodes))
        options = [f"-Wl,--version-script={script}", f"-Wl,-soname={path.name}"]
        run("gcc", "-shared", "-fPIC", "-O1", "-o", path, source, absent, *options)


def cut(library: Path, section: str) -> None:
    """Take *section* out of the file *library*; where it was in memory, there are zeros then.

    What is not loaded goes too: symbols for debugging, notes, the table of sections.
    """
    row = re.search(rf" {re.escape(section)} +PROGBITS +\w+ (\w+) (\w+)", readelf("-S", library))
    if not row:
        return
    start, size = (int(number, 16) for number in row.groups())
    start, end = -(-start // PAGE) * PAGE, (start + size) // PAGE * PAGE
    data = memoryview(library.read_bytes())
    head = list(HEADER.unpack_from(data))
    first, count = head[5], head[10]
    segments = []
    for i in range(count):
        segment = Segment._make(SEGMENT.unpack_from(data, first + SEGMENT.size * i))
        before, after = start - segment.offset, end - segment.offset
        if segment.kind == PT_LOAD and 0 < before < after < segment.file_bytes:
            segments += [
                segment._replace(file_bytes=before, memory_bytes=after),
                segment._replace(
                    offset=end,
                    address=segment.address + after,
                    physical_address=segment.physical_address + after,
                    file_bytes=segment.file_bytes - after,
                    memory_bytes=segment.memory_bytes - after,
                ),
            ]
        elif segment.kind != PT_NOTE:  # its place in the table goes to the second half
            segments.append(segment)
    assert len(segments) <= count, f"{library}: no room for another program header"
    out, moved_by = bytearray(), {}
    for segment in segments:
        if segment.kind == PT_LOAD:
            out += bytes(-len(out) % PAGE)
            page = segment.offset // PAGE * PAGE
            moved_by[segment] = len(out) - page
            out += data[page : segment.offset + segment.file_bytes]
    for i, segment in enumerate(segments):
        home = next(
            (load for load in moved_by if 0 <= segment.offset - load.offset < load.file_bytes), None
        )
        offset = segment.offset + (moved_by[home] if home else 0)
        SEGMENT.pack_into(out, first + SEGMENT.size * i, *segment._replace(offset=offset))
    head[6], head[10], head[12], head[13] = 0, len(segments), 0, 0
    HEADER.pack_into(out, 0, *head)
    library.write_bytes(out)


def readelf(*arguments: str | Path) -> str:
    return run("readelf", "-W", *arguments)


def run(*command: str | Path) -> str:
    """What *command* prints; its failure ends the build."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1], "torch", "lib"))
