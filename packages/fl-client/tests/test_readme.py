"""The README's example runs, and its tables are those of the settings."""

import re
from pathlib import Path

import pytest
from icos_fl_client.serving.settings import ForecasterSettings
from icos_fl_client.settings import NodeConfig, RunConfig

PLAIN = [
    field.alias
    for field in RunConfig.model_fields.values()
    if isinstance(field.default, int | float | str) and field.default != ""
]
README = (Path(__file__).parents[1] / "README.md").read_text()


def keys(part: str) -> list[str]:
    """First cells of the first table of the part with this heading."""
    text = README.split(f"\n## {part}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_the_readmes_example_runs(example: str):
    exec(example, {"__name__": "example"})


def test_every_key_of_a_node_is_in_the_readme():
    expected = [field.alias for field in NodeConfig.model_fields.values()]
    assert expected == keys("In a SuperNode")


def test_every_key_of_a_run_is_in_the_readme():
    assert [field.alias for field in RunConfig.model_fields.values()] == keys("Settings of a run")


@pytest.mark.parametrize("key", PLAIN)
def test_defaults_of_a_run_are_in_the_readme(key):
    (cell,) = re.findall(rf"^\| `{key}` \| ([^|]+) \|", README, flags=re.MULTILINE)
    default = next(f.default for f in RunConfig.model_fields.values() if f.alias == key)

    assert str(default) == cell.strip("`")


def test_every_setting_of_the_forecaster_is_in_the_readme():
    text = README.split("\n## The forecaster\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \|", text, flags=re.MULTILINE)
    told = {name.lower() for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}
    expected = set()
    for name, field in ForecasterSettings.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        expected |= {f"{name}__{key}" for key in inner} or {name}
    assert expected == told
