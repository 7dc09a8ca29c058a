"""The files of deploy/monitoring, by promtool."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

FOLDER = Path(__file__).parents[2] / "deploy/monitoring"
TESTS = ("alerts_test.yml", "forecasts_test.yml")


def test_promtool_takes_the_configuration_and_the_alerts(promtool):
    promtool("check", "config", "prometheus.yml")


@pytest.mark.parametrize("tests", TESTS)
def test_rules_and_alerts_pass_their_unit_tests(promtool, tests):
    promtool("test", "rules", tests)


def test_the_commands_of_the_docs_run(promtool):
    text = (FOLDER.parents[1] / "docs/forecasts.md").read_text()
    commands = re.findall(r"^promtool (.+)$", text, flags=re.MULTILINE)
    for command in commands:
        promtool(*command.replace("deploy/monitoring/", "").split())
    assert len(commands) == 2


def test_every_alert_has_a_unit_test_that_sees_it_raised(alerts):
    raised = {
        case["alertname"]
        for tests in TESTS
        for test in YAML(typ="safe").load(FOLDER / tests)["tests"]
        for case in test.get("alert_rule_test", ())
        if case.get("exp_alerts")
    }
    assert {alert["alert"] for alert in alerts} == raised


def test_every_alert_must_last_and_says_what_to_do(alerts):
    for alert in alerts:
        assert alert["for"]
        assert set(alert["annotations"]) == {"summary", "action"}
        assert alert["labels"]["severity"] in ("critical", "warning")
