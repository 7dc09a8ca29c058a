from icos_fl.federation.v1 import records


def test_records_of_a_metric_end_in_its_name():
    assert (
        records.arrays("cpu_usage"),
        records.train("cpu_usage"),
        records.evaluate("cpu_usage"),
    ) == ("arrays.cpu_usage", "train.cpu_usage", "evaluate.cpu_usage")
