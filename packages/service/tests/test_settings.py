"""Settings from the environment."""

import pytest
from icos_fl_service.settings import ServiceSettings, SettingsError, load, split_address
from pydantic_settings import SettingsConfigDict


class Settings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="A_SERVICE_", frozen=True, extra="forbid")

    rows: int = 3


def test_metrics_are_off_without_an_address(monkeypatch):
    assert not load(Settings).has_metrics
    monkeypatch.setenv("A_SERVICE_METRICS_ADDRESS", "127.0.0.1:9464")
    assert load(Settings).has_metrics


def test_every_bad_and_every_unknown_variable_is_named(monkeypatch):
    monkeypatch.setenv("A_SERVICE_METRICS_ADDRESS", "9464")
    monkeypatch.setenv("A_SERVICE_METRICS_OTLP_ENDPOINT", "collector:4317")
    monkeypatch.setenv("A_SERVICE_ROWS", "many")
    monkeypatch.setenv("A_SERVICE_ROW", "4")
    with pytest.raises(SettingsError) as caught:
        load(Settings)
    lines = str(caught.value).splitlines()
    assert lines[0] == "A_SERVICE_ROW: no such setting; did you mean A_SERVICE_ROWS?"
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "A_SERVICE_METRICS_ADDRESS='9464'",
        "A_SERVICE_METRICS_OTLP_ENDPOINT='collector",
        "A_SERVICE_ROWS='many'",
    ]


@pytest.mark.parametrize(
    ("address", "parts"), [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:80", ("::1", 80))]
)
def test_an_address_is_a_host_and_a_port(address, parts):
    assert split_address(address) == parts
