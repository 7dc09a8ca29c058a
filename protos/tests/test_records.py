import pytest
from icos_fl.federation.v1 import records


def test_the_key_of_a_number_tells_kind_metric_and_name():
    assert records.number("train", "cpu_usage", "seconds") == "train.cpu_usage.seconds"


@pytest.mark.parametrize("metric", ["cpu_usage", "system.cpu.time"])
def test_a_key_is_split_into_what_it_was_made_of(metric):
    key = records.number(records.EVALUATE, metric, records.NUM_EXAMPLES)
    assert records.split_number(key) == ("evaluate", metric, "num-examples")


def test_a_key_of_another_kind_has_no_metric():
    assert records.split_number("mood") == ("mood", "", "")
