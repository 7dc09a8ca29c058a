"""The files of deploy/monitoring, by promtool."""

from pathlib import Path

from ruamel.yaml import YAML

FOLDER = Path(__file__).parents[2] / "deploy/monitoring"


def test_promtool_takes_the_configuration_and_the_alerts(promtool):
    promtool("check", "config", "prometheus.yml")


def test_the_alerts_pass_their_unit_tests(promtool):
    promtool("test", "rules", "alerts_test.yml")


def test_every_alert_has_a_unit_test_that_sees_it_raised(alerts):
    tests = YAML(typ="safe").load(FOLDER / "alerts_test.yml")["tests"]
    raised = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert {alert["alert"] for alert in alerts} == raised


def test_every_alert_must_last_and_says_what_to_do(alerts):
    for alert in alerts:
        assert alert["for"]
        assert set(alert["annotations"]) == {"summary", "action"}
        assert alert["labels"]["severity"] in ("critical", "warning")
