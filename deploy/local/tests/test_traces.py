"""Reading traces: what they give, and the one line that each bad one gets."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from icos_fl_local import traces
from icos_fl_local.traces import TraceError


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def message_of(folder: Path, text: str) -> str:
    """What is said of a trace with this text, less the folder's name."""
    write(folder, "a.csv", text)
    with pytest.raises(TraceError) as error:
        traces.load(folder)
    return str(error.value).replace(f"{folder}/", "")


def test_a_trace_has_columns_units_times_and_values(tmp_path):
    write(tmp_path, "a.csv", "time_unix_s,power_w,load1_ratio\n100,1.5,0.1\n102,2.5,0.2\n")
    (trace,) = traces.load(tmp_path)
    assert (trace.node, trace.columns, trace.units) == ("a", ("power_w", "load1_ratio"), ("W", "1"))
    assert trace.times_s.tolist() == [100, 102]
    assert trace.values_tf.tolist() == [[1.5, 0.1], [2.5, 0.2]]
    assert (trace.times_s.dtype, trace.values_tf.dtype) == (np.int64, np.float64)


def test_interval_is_the_median_distance_of_rows(tmp_path):
    write(tmp_path, "a.csv", "time_unix_s,power_w\n100,1\n102,1\n104,1\n9000,1\n")
    assert traces.load(tmp_path)[0].interval_seconds == 2.0


def test_a_trace_of_one_row_has_an_interval(tmp_path):
    write(tmp_path, "a.csv", "time_unix_s,power_w\n100,1\n")
    assert traces.load(tmp_path)[0].interval_seconds == 1.0


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_values_are_read_exactly(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("traces")
    rows = [f"{second},{value!r}" for second, value in enumerate(values, start=1)]
    write(folder, "a.csv", "\n".join(["time_unix_s,power_w", *rows]) + "\n")
    assert traces.load(folder)[0].values_tf[:, 0].tolist() == values


def test_line_ends_of_windows_and_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftime_unix_s,power_w\r\n1,2\r\n")
    assert traces.load(tmp_path)[0].values_tf.tolist() == [[2.0]]


def test_nodes_are_sorted_and_found_in_folders(tmp_path):
    for name in ("b.csv", "x/a.csv", "x/y/c.csv"):
        write(tmp_path, name, "time_unix_s,power_w\n1,2\n")
    assert [trace.node for trace in traces.load(tmp_path)] == ["a", "b", "c"]


def test_files_of_one_name_are_told_apart_by_their_folder(tmp_path):
    for name in ("x/a.csv", "y/a.csv", "y/b.csv"):
        write(tmp_path, name, "time_unix_s,power_w\n1,2\n")
    assert [trace.node for trace in traces.load(tmp_path)] == ["b", "x-a", "y-a"]


def test_two_files_that_would_be_one_node_are_refused(tmp_path):
    for name in ("x/a.csv", "y/a.csv", "x-a.csv"):
        write(tmp_path, name, "time_unix_s,power_w\n1,2\n")
    with pytest.raises(TraceError, match="would both be the node 'x-a'"):
        traces.load(tmp_path)


def test_the_first_nodes_are_taken(tmp_path):
    for name in ("a.csv", "b.csv", "c.csv"):
        write(tmp_path, name, "time_unix_s,power_w\n1,2\n")
    assert [trace.node for trace in traces.load(tmp_path, 2)] == ["a", "b"]


def test_more_nodes_than_traces_are_refused(tmp_path):
    for name in ("a.csv", "b.csv", "c.csv"):
        write(tmp_path, name, "time_unix_s,power_w\n1,2\n")
    with pytest.raises(TraceError) as error:
        traces.load(tmp_path, 5)
    assert str(error.value) == f"{tmp_path} has 3 traces, 5 nodes were asked for"


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(TraceError, match="has no CSV file"):
        traces.load(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TraceError, match="nowhere is not a folder"):
        traces.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("3,abc", "column power_w: 'abc' is not a number"),
        ("3,1_000", "column power_w: '1_000' is not a number"),
        ("3,٣", "column power_w: '٣' is not a number"),
        ("3,nan", "column power_w: 'nan' is not finite"),
        ("3,-inf", "column power_w: '-inf' is not finite"),
        ("3,1e999", "column power_w: '1e999' is not finite"),
        ("3,", "column power_w: '' is empty; a missing sample is a row that is absent"),
        ("2,5", "column time_unix_s: '2' does not come after the row before"),
        ("1,5", "column time_unix_s: '1' does not come after the row before"),
        ("3.5,5", "'3.5' is not a whole number of seconds from 1 to 9223372036"),
        ("1422977632000,5", "'1422977632000' is not a whole number of seconds"),
        ("3,4,5", "expected 2 values, found 3"),
        ("3", "expected 2 values, found 1"),
        ("", "expected 2 values, found 1"),
    ],
)
def test_a_bad_row_is_named_by_file_line_column_and_value(tmp_path, row, problem):
    message = message_of(tmp_path, f"time_unix_s,power_w\n1,2\n2,3\n{row}\n4,5\n")
    assert message.startswith("a.csv:4: ")
    assert problem in message


@pytest.mark.parametrize("time", ["0", "-5"])
def test_a_time_before_1970_is_refused_in_the_first_row_too(tmp_path, time):
    message = message_of(tmp_path, f"time_unix_s,power_w\n{time},2\n")
    assert f"a.csv:2: column time_unix_s: {time!r} is not a whole number" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.csv: empty, expected a header that begins with time_unix_s"),
        ("time,power_w\n1,2\n", "a.csv:1: first column is 'time', expected time_unix_s"),
        ("time_unix_s\n1\n", "a.csv:1: no column beside time_unix_s"),
        ("time_unix_s,power_w\n", "a.csv: a header, but no rows"),
        ("time_unix_s,a_w,a_w\n1,2,3\n", "a.csv:1: column a_w is there twice"),
        ("time_unix_s,time_unix_s\n1,2\n", "a.csv:1: column time_unix_s is there twice"),
        (
            "time_unix_s,power_w,power_consumption\n1,2,3\n",
            "a.csv:1: column power_w is there twice",
        ),
        ("time_unix_s,,power_w\n1,2,3\n", "a.csv:1: column 2 has no name"),
        ("time_unix_s,power_w\n\n", "a.csv:2: expected 2 values, found 1"),
    ],
)
def test_a_bad_file_gets_one_line(tmp_path, text, message):
    assert message_of(tmp_path, text) == message


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"time_unix_s,power_w\n1,2\n2,\xff\n")
    with pytest.raises(TraceError, match=r"a.csv:3: byte 0xff is not UTF-8"):
        traces.load(tmp_path)


@pytest.mark.parametrize(
    ("column", "name", "unit"),
    [
        ("power_w", "power_consumption", "W"),
        ("cpu_percent", "cpu_usage", "%"),
        ("memory_used_mib", "memory_usage", "MiB"),
        ("memory_available_mib", "memory_available_mib", "MiB"),
        ("net_receive_kbps", "net_receive_kbps", "kBy/s"),
        ("queue", "queue", ""),
    ],
)
def test_columns_have_the_names_that_users_know(column, name, unit):
    assert (traces.column_of(column), traces.unit_of(column)) == (name, unit)


def test_four_traces_are_shipped_with_power_and_cpu():
    shipped = traces.load(traces.SHIPPED)
    assert [trace.node for trace in shipped] == [
        "opteron-6140",
        "pfe1",
        "xeon-e5-2640",
        "xeon-x5650",
    ]
    assert all({"power_w", "cpu_percent"} <= set(trace.columns) for trace in shipped)


def test_the_power_of_shipped_traces_goes_out_as_scaphandre_sends_it():
    assert all(trace.has_whole_microwatts for trace in traces.load(traces.SHIPPED))


def test_shipped_traces_move_in_the_part_that_is_tested_on():
    # Sequences of 60 + 20 steps of 15 s without a gap, in the last fifth of the steps.
    for trace in traces.load(traces.SHIPPED):
        steps = np.unique(trace.times_s // 15)
        tested = steps[int(0.8 * len(steps)) :]
        runs = np.split(tested, np.flatnonzero(np.diff(tested) > 1) + 1)
        assert sum(max(0, len(run) - 79) for run in runs) >= 50, trace.node
        rows = trace.times_s >= tested[0] * 15
        assert trace.values_tf[rows, trace.columns.index("cpu_percent")].std() > 5, trace.node


def test_every_shipped_source_has_its_licence_and_describes_its_columns():
    for file in traces.SHIPPED.glob("*/*.csv"):
        described = json.loads((file.parent / "columns.json").read_text())
        names = [column["name"] for column in described["columns"]]
        assert file.read_text().splitlines()[0] == ",".join(names)
        assert file.stem in described["nodes"]
        assert (file.parent / "LICENSE").stat().st_size > 1_000


def test_the_bridge_is_told_each_column_its_unit_and_where_it_comes_from(tmp_path):
    write(tmp_path, "a.csv", "time_unix_s,power_w,net_receive_kbps\n1,2.5,3\n2,2.5,3\n")
    write(tmp_path, "b.csv", "time_unix_s,power_w\n1,0.123456789\n")
    assert traces.bridge_config(traces.load(tmp_path)) == {
        "node_attribute": "host.name",
        "interval_seconds": 1,
        "window_rows": 2,
        "columns": {
            "power_consumption": {
                "unit": "W",
                "sources": [
                    {
                        "terms": [{"metric": "scaph_host_power_microwatts"}],
                        "divide_by": 1_000_000,
                    },
                    {"terms": [{"metric": "power_w"}]},
                ],
            },
            "net_receive_kbps": {
                "unit": "kBy/s",
                "sources": [{"terms": [{"metric": "net_receive_kbps"}]}],
            },
        },
    }
