"""What the README says is so."""

import re
from pathlib import Path

from icos_fl_otlp_bridge.config import default_config
from icos_fl_otlp_bridge.reasons import Reason
from icos_fl_otlp_bridge.settings import BridgeSettings

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_every_configuration_of_the_readme_is_taken(config):
    examples = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    loaded = [config(example) for example in examples if "columns:" in example]
    assert [list(each.all_columns) for each in loaded] == [
        [*default_config().columns, "fan_speed"],
        ["disk_busy", "latency_p95"],
    ]


def test_every_setting_is_in_the_readme_with_its_default():
    for name, field in BridgeSettings.model_fields.items():
        row = re.search(rf"^\| `ICOS_FL_BRIDGE_{name.upper()}(?:__\w+)?` \| (.*?) \|", README, re.M)
        assert row, name
        if name not in ("store", "config", "tls", "tokens"):
            default = str(field.default)
            assert row[1] == f"`{default.lower() if default in ('True', 'False') else default}`"


def test_every_reason_code_is_in_the_readme():
    assert {reason.value for reason in Reason} == set(
        re.findall(r"^\| `([a-z_]+)` \|", README, flags=re.M)
    )
