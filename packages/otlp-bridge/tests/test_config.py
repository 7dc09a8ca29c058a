"""The configuration file: what it means, and how it is refused."""

from pathlib import Path

import pytest
from icos_fl_otlp_bridge import ConfigError, default_config, load_config

COLUMN = "columns:\n  a: {unit: W, sources: [{terms: [{metric: m}]}]}\n"


def refused(config, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config(text)
    return str(caught.value)


def test_the_packaged_configuration_has_the_columns_that_users_know():
    units = {name: column.unit for name, column in default_config().columns.items()}
    assert units == {"power_consumption": "W", "cpu_usage": "%", "memory_usage": "MiB"}


def test_what_is_left_out_has_its_default(config):
    loaded = config(COLUMN)
    assert (loaded.node_attribute, loaded.interval_seconds, loaded.window_rows) == (
        "host.name",
        3.0,
        300,
    )


def test_a_file_without_columns_has_the_packaged_columns(config):
    loaded = config("interval_seconds: 5\n")
    assert loaded.interval_seconds == 5
    assert loaded.columns == default_config().columns


def test_more_columns_are_beside_the_packaged_ones(config):
    loaded = config("more_" + COLUMN)
    assert list(loaded.all_columns) == [*default_config().columns, "a"]
    assert loaded.metrics == default_config().metrics | {"m"}


def test_more_columns_are_beside_the_files_own(config):
    loaded = config(COLUMN + "more_" + COLUMN.replace("a:", "b:"))
    assert list(loaded.all_columns) == ["a", "b"]


def test_case_14_1e6_is_a_million(config):
    assert config("window_rows: 1e6\n" + COLUMN).window_rows == 1_000_000


@pytest.mark.parametrize("word", ["on", "off", "yes", "no"])
def test_case_14_words_are_texts_and_no_truth_values(config, word):
    loaded = config(f"columns:\n  {word}: {{unit: {word}, sources: [{{terms: [{{metric: m}}]}}]}}")
    assert [(name, column.unit) for name, column in loaded.columns.items()] == [(word, word)]


@pytest.mark.parametrize("number", ["1_000", "-1_0", "1_0.5", "0x1_0", "1_0e3"])
def test_case_14_a_number_with_underscores_is_refused(config, number):
    message = refused(config, f"node_attribute: n\nwindow_rows: {number}\n{COLUMN}")
    assert message.endswith(
        f"bridge.yaml, line 2: window_rows: write the number without underscores; read: {number!r}"
    )


def test_case_14_a_key_twice_is_refused(config):
    message = refused(config, f"window_rows: 3\n{COLUMN}window_rows: 4\n")
    assert 'bridge.yaml, line 4: found duplicate key "window_rows" with value "4"' in message


def test_case_14_a_column_twice_is_refused(config):
    message = refused(config, COLUMN + "  a: {sources: [{terms: [{metric: n}]}]}\n")
    assert 'bridge.yaml, line 3: found duplicate key "a"' in message


def test_case_14_a_tab_is_refused_with_its_line(config):
    message = refused(config, "columns:\n\ta: 1\n")
    assert "bridge.yaml, line 2: found character '\\t'" in message
    assert message.endswith("read: 'a: 1'")


def test_case_14_a_file_that_asks_for_yaml_1_1_is_refused(config):
    message = refused(config, f"%YAML 1.1\n---\n{COLUMN}")
    assert message.endswith("line 1: the file is read as YAML 1.2; read: '%YAML 1.1'")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("windw_rows: 3\n" + COLUMN, "line 1: windw_rows: Extra inputs are not permitted; read: 3"),
        ("window_rows: 1.5\n" + COLUMN, "line 1: window_rows: Input should be a valid integer"),
        ("window_rows: true\n" + COLUMN, "line 1: window_rows: a number is needed; read: True"),
        ('window_rows: "3"\n' + COLUMN, "line 1: window_rows: a number is needed; read: '3'"),
        ("window_rows: 0\n" + COLUMN, "greater than or equal to 1; read: 0"),
        ("interval_seconds: 0\n" + COLUMN, "greater than or equal to 0.001; read: 0"),
        ("interval_seconds: 1:30\n" + COLUMN, "a number is needed; read: '1:30'"),
        ("interval_seconds: 2020-99-99\n" + COLUMN, "line 1: interval_seconds: neither a text"),
        ("window_rows: " + "9" * 5000, "line 1: window_rows: a number of more than 40 characters"),
        ("a: b\x00", "line 1: no character of YAML; read: '\\x00'"),
        ("[" * 600, "not a YAML document"),
        ("- a\n", "a mapping is needed; read: ['a']"),
        ("", "a mapping is needed; read: None"),
        (COLUMN + "---\n" + COLUMN, "line 3: but found another document"),
        ("columns: {}\n", "line 1: columns: Dictionary should have at least 1 item"),
        (
            "columns:\n  1: {sources: []}\n",
            "line 2: columns.1.[key]: Input should be a valid string",
        ),
        (COLUMN + "more_" + COLUMN, "more_columns has a, which is a column already"),
        (COLUMN.replace("unit: W", "unit: 1"), "line 2: columns.a.unit: Input should be a valid"),
        (COLUMN.replace("}]}", "}], divide_by: 0}"), "divide_by is 0"),
        (COLUMN.replace("}]}", "}], divide_by: .nan}"), "divide_by: Input should be a finite"),
        (COLUMN.replace("m}", "m, rate: on}"), "rate: Input should be a valid boolean; read: 'on'"),
        (COLUMN.replace("m}", "m, take: quantile}"), "need each other"),
        (COLUMN.replace("m}", "m, quantile: 0.5}"), "need each other"),
        (COLUMN.replace("m}", "m, take: quantile, quantile: 95}"), "less than or equal to 1"),
        (COLUMN.replace("m}", "m, take: mean, rate: true}"), "a rate of a mean"),
        (COLUMN.replace("m}", "m, combine: avg}"), "combine: Input should be 'sum', 'mean'"),
    ],
)
def test_a_fault_is_told_with_its_line_its_key_and_what_was_read(config, text, said):
    message = refused(config, text)
    assert said in message
    assert "bridge.yaml" in message


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("attribute: x", "exactly one of equals, one_of, matches, exists; given: []"),
        ("attribute: x, equals: 1, exists: true", "given: ['equals', 'exists']"),
        ("attribute: x, matches: '['", "matches: unterminated character set"),
        ("attribute: x, exists: false", "exists: Input should be True; read: False"),
        ("equals: 1", "attribute: Field required"),
    ],
)
def test_a_predicate_has_one_condition_that_can_be_used(config, condition, said):
    assert said in refused(config, f"resources: [{{{condition}}}]\n{COLUMN}")


def test_every_fault_has_a_line_of_its_own(config):
    message = refused(config, "window_rows: 0\ninterval_seconds: x\n" + COLUMN)
    lines = sorted(line.split("bridge.yaml, ")[1].split(": ")[0] for line in message.splitlines())
    assert lines == ["line 1", "line 2"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"gone.yaml: cannot be read: No such file"):
        load_config(tmp_path / "gone.yaml")


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path):
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"node_attribute: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin.yaml: cannot be read: not UTF-8"):
        load_config(file)
