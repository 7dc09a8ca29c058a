"""docs/messages.md has every message that asks people to act, and none that no program says.

What is said is read from the source: the constant phrase of each warning and error in a log, the
text of each error of our own, and the words for what is wrong. … stands for what is filled in.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from icos_fl.forecast.v1.forecast_service_pb2 import Reason as NoForecast
from icos_fl_local import doctor
from icos_fl_otlp_bridge.reasons import Reason as Rejected
from icos_fl_server.enrolment.refusals import Reason as Refused
from icos_fl_timeseries_store.conditions import Condition

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/messages.md"
SOURCES = sorted([*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("deploy/local/src/**/*.py")])
ANY = "…"
LITERAL_MIN = 6
"""Characters of its own that a message has; what has fewer only joins others."""

SPEAK_FOR_THEMSELVES = {
    "UsageError": "names the option, what was given and what is possible",
    "TraceError": "names file, line, column and what is wrong",
    "ConfigError": "names the setting, or file and line, with what was read and the limit",
    "ExpectationsError": "names file, key and what was read",
    "InvalidSeries": "tells who programs against the processor what was asked wrongly",
    "InvalidRows": "tells who programs against the store what was given wrongly",
    "WeightsError": "is told as part of another message",
    "Undecodable": "is told with a code that the page has, INVALID_ARGUMENT",
    "Unhealthy": "says what the service that was asked answers",
}
"""Errors whose text is all that one needs, by class."""

WORDS = {
    *(condition.word for condition in Condition),
    *(reason.value for reason in Rejected),
    *(reason.label for reason in Refused),
    *(name[7:].lower().replace("_", "-") for name in NoForecast.keys()[1:]),
    *("ok", "no-data", "silent", "failed", "unusable"),  # of a node in history.json
    *(check.name for check in doctor.examine(ROOT, {})),
    *(
        name
        for rules in ROOT.glob("deploy/monitoring/*.yml")
        for name in re.findall(r"- alert: (\w+)", rules.read_text(encoding="utf-8"))
    ),
}


def phrase(node: ast.AST) -> str | None:
    """The text of an expression; None if it is no text."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%[sd]", ANY, text)
        case ast.JoinedStr(values=parts):
            return "".join(phrase(part) or ANY for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right) if phrase(left):
            return f"{phrase(left)}{phrase(right) or ANY}"
    return None


def is_error(name: str) -> bool:
    return name == "Exception" or any(map(is_error, BASES.get(name, ())))


def told(tree: ast.AST) -> Iterator[str]:
    """What *tree* tells people that does not speak for itself."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Attribute(ast.Name("log" | "_log"), method), [said, *_]):
                text = phrase(said) if method in ("warning", "error", "exception") else None
            case ast.Call(ast.Name("log"), [ast.Name("WARN" | "WARNING" | "ERROR"), said, *_]):
                text = phrase(said)
            case ast.Call(ast.Name(name), [said, *_]) if name in BASES and is_error(name):
                text = None if name in SPEAK_FOR_THEMSELVES else phrase(said)
            case ast.Call(ast.Name("Failure"), [_, said]):
                text = phrase(said)
            case _:
                continue
        if text and len(text.replace(ANY, "")) >= LITERAL_MIN:
            yield text


TREES = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
BASES = {
    node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
    for tree in TREES
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
}
TOLD = sorted({text for tree in TREES for text in told(tree)})
SAID = {text for tree in TREES for node in ast.walk(tree) if (text := phrase(node)) and " " in text}


def quoted() -> set[str]:
    """What stands in backticks in the first cell of each line of the page's tables."""
    cells = re.findall(r"^\| (.*?) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    return {quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell)}


def covers(quote: str, text: str) -> bool:
    """Is *text* what *quote* says?"""
    parts = quote.split(ANY)
    pattern = ".*".join(map(re.escape, parts))
    # The first is quick, for the many texts of which none of it is true.
    return all(part in text for part in parts) and bool(re.fullmatch(pattern, text, re.DOTALL))


QUOTED = quoted()


def test_every_word_for_what_is_wrong_stands_there():
    assert sorted(WORDS - QUOTED) == []


def test_every_message_stands_there():
    assert [text for text in TOLD if not any(covers(quote, text) for quote in QUOTED)] == []


def test_nothing_stands_there_that_no_program_says():
    messages = sorted(QUOTED - WORDS)
    assert [quote for quote in messages if not any(covers(quote, text) for text in SAID)] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('log.warning("so it is", node=node)', ["so it is"]),
        ('_log.error("disk full: folder=%s", folder)', ["disk full: folder=…"]),
        ('log(WARNING, "Task %d, %s", number, details)', ["Task …, …"]),
        ('raise ServerError(f"no node can learn {metric!r}; " + why)', ["no node can learn …; …"]),
        ('Failure("silent", f"no reply in {seconds:g} s")', ["no reply in … s"]),
        ('raise UsageError(f"--nodes {count}: at least 1 is needed")', []),
        ('log.info("round finished")', []),
        ('raise LocalError(f"{path}: {error}")', []),
    ],
)
def test_what_is_told_is_found_in_the_source(source, found):
    assert list(told(ast.parse(source))) == found


def test_a_message_is_covered_by_its_own_words_alone():
    text = "no node can learn …; …"
    quotes = [
        "no node can learn …; …",
        "no node can learn …",
        "no node can teach …; …",
        "can learn",
    ]
    assert [covers(quote, text) for quote in quotes] == [True, True, False, False]
