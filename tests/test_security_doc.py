"""docs/security.md: each line of its tables names the tests that prove it, or is not defended."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/security.md"
NOT_DEFENDED = "**not defended**"


def rows(text: str) -> list[list[str]]:
    """The cells of each line of a table, without head and rule."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for table in tables
        for line in table.splitlines()[2:]
    ]


def faults(text: str) -> list[str]:
    """Lines that name neither an existing test nor that they are not defended."""
    found = []
    for row in rows(text):
        references = re.findall(r"`(\S+)::(\w+)`", row[-1])
        if not references and not row[-1].startswith(NOT_DEFENDED):
            found.append(f"{row[0]}: no test")
        for path, name in references:
            file = ROOT / path
            if not file.is_file():
                found.append(f"{row[0]}: no file {path}")
            elif not re.search(rf"^ *def {name}\(", file.read_text(encoding="utf-8"), re.M):
                found.append(f"{row[0]}: no {name} in {path}")
    return found


def test_each_line_has_its_test_or_is_not_defended():
    assert faults(DOCUMENT.read_text(encoding="utf-8")) == []


def test_there_are_lines_of_both_kinds():
    last = [row[-1] for row in rows(DOCUMENT.read_text(encoding="utf-8"))]
    assert sum("::test_" in cell for cell in last) > 30
    assert sum(cell.startswith(NOT_DEFENDED) for cell in last) > 5


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ("trust us", "it: no test"),
        ("`tests/test_none.py::test_x`", "it: no file tests/test_none.py"),
        ("`tests/test_house.py::test_x`", "it: no test_x in tests/test_house.py"),
        ("`tests/test_security_doc.py::test_there_are_lines`", "it: no test_there_are_lines in "),
        (f"`tests/test_security_doc.py::faults`, {NOT_DEFENDED}", ""),
        (f"{NOT_DEFENDED}: so it is", ""),
    ],
)
def test_a_line_without_proof_is_found(cell, fault):
    found = faults(f"| who | what | proof |\n| --- | --- | --- |\n| it | can | {cell} |\n")
    assert len(found) == bool(fault)
    assert "".join(found).startswith(fault)


def test_no_key_is_in_the_repository():
    done = subprocess.run(
        ["git", "grep", "-lE", "^-----BEGIN [A-Z ]*PRIVATE KEY-----$"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")
