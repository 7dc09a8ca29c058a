"""Each provider gives what its consumers say that they need (their needs.toml), and a broken one is
caught: real processes of the providers, over real gRPC, on a real store."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    Metadata,
    RecordDict,
)
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from icos_fl.forecast.v1 import forecast_service_pb2 as forecast_pb
from icos_fl.forecast.v1.forecast_service_pb2_grpc import ForecastServiceStub
from icos_fl_client.app import app
from icos_fl_service.shim import tied
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import ModelVersion, Store, connect
from icos_fl_timeseries_store import errors as store_errors
from icos_fl_timeseries_store.testing import StoreProcesses, store_processes
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as otlp
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub

ROOT = Path(__file__).parents[2]
SECOND = 1_000_000_000
START_NS = 1_700_000_010 * SECOND
ROWS = 40
NODE = "needs"
METRICS = ["cpu", "power"]
Need = dict[str, Any]
Lacking = Callable[[Any, Any, str], list[str]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcesses]:
    """With the windows that the needs of processor and forecaster are about."""
    with store_processes(tmp_path_factory.mktemp("store")) as running:
        for node, rows in ((NODE, ROWS), (f"{NODE}-short", 1)):
            numbers = np.arange(rows, dtype=float)
            with connect(running.settings) as connected:
                connected.create_window(node).append(
                    METRICS,
                    START_NS + np.arange(rows) * 15 * SECOND,
                    np.column_stack([numbers, 100 + numbers]),
                    {"cpu": "%", "power": "W"},
                )
        yield running


@contextlib.contextmanager
def serving(
    module: str, prefix: str, store: StoreProcesses, sources: Path | None = None, **settings: str
) -> Iterator[str]:
    """The address of a service, of *sources* rather than of what is installed."""
    address = f"127.0.0.1:{free_port()}"
    environment = {
        f"{prefix}_LISTEN_ADDRESS": address,
        f"{prefix}_STORE__PORT": str(store.settings.port),
        **({"PYTHONPATH": str(sources)} if sources else {}),
        **{f"{prefix}_{name}": value for name, value in settings.items()},
    }
    process = subprocess.Popen(
        tied(sys.executable, "-m", module), env={**os.environ, **environment}
    )
    try:
        with grpc.insecure_channel(address) as channel:
            request = health_pb2.HealthCheckRequest()
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                request, timeout=120, wait_for_ready=True
            )
            assert any(answer.status == health_pb2.HealthCheckResponse.SERVING for answer in watch)
            watch.cancel()
        yield address
    finally:
        process.terminate()
        process.wait(30)


# The processor and the forecaster

PROCESSOR = "icos_fl.processor.v1.ProcessorService"
FORECASTER = "icos_fl.forecast.v1.ForecastService"


def unmet(address: str, name: str, need: Need, lacking: Lacking) -> list[str]:
    """Asked as the provider itself, by reflection, says that it can be asked."""
    need = json.loads(json.dumps(need).replace("<node>", NODE))
    with grpc.insecure_channel(address) as channel:
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName(name).methods_by_name.get(need["call"])
        if method is None:
            return [f"{need['call']}: there is no such call"]
        request = message_factory.GetMessageClass(method.input_type)()
        answer = message_factory.GetMessageClass(method.output_type)
        try:
            json_format.ParseDict(need["request"], request, descriptor_pool=pool)
        except json_format.ParseError as error:
            return [f"{need['call']}: {error}"]
        asking = channel.unary_stream if method.server_streaming else channel.unary_unary
        call = asking(
            f"/{name}/{need['call']}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        answered = call(request, timeout=30)
        got = [
            json_format.MessageToDict(
                each,
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
                descriptor_pool=pool,
            )
            for each in (answered if method.server_streaming else [answered])
        ]
    got = json.loads(json.dumps(got), object_hook=_with_numbers)
    return lacking(need["answers"], got, need["call"])


def _with_numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """64-bit integers, which are strings in protobuf's JSON."""
    return {
        name: int(value) if isinstance(value, str) and value.isdigit() else value
        for name, value in fields.items()
    }


@pytest.fixture(scope="module")
def processor(store: StoreProcesses) -> Iterator[str]:
    with serving("icos_fl_processor", "ICOS_FL_PROCESSOR", store) as address:
        yield address


def test_processor(processor: str, need_of_processor: Need, lacking: Lacking):
    assert unmet(processor, PROCESSOR, need_of_processor, lacking) == []


@pytest.fixture(scope="module")
def forecaster(store: StoreProcesses) -> Iterator[str]:
    """When it has said what it can of the windows."""
    service = "icos_fl_client.serving", "ICOS_FL_FORECASTER", store
    with (
        serving(*service, RECORDED="true") as address,
        grpc.insecure_channel(address) as channel,
    ):
        stub = ForecastServiceStub(channel)  # type: ignore[no-untyped-call]
        waited_for = {(node, metric) for node in (NODE, f"{NODE}-short") for metric in METRICS}
        for answer in stub.WatchForecasts(forecast_pb.WatchForecastsRequest(), timeout=60):
            waited_for.discard((answer.forecast.node, answer.forecast.metric))
            if not waited_for:
                break
        yield address


def test_forecaster(forecaster: str, need_of_forecaster: Need, lacking: Lacking):
    assert unmet(forecaster, FORECASTER, need_of_forecaster, lacking) == []


# The bridge


def unmet_by_bridge(address: str, store: StoreProcesses, need: Need, lacking: Lacking) -> list[str]:
    node = f"needs-{uuid.uuid4().hex}"
    request = otlp.ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    resource.resource.attributes.add(key="host.name").value.string_value = node
    for point in need["points"]:
        metric = resource.scope_metrics.add().metrics.add(name=point["metric"])
        added = metric.gauge.data_points.add(time_unix_nano=START_NS)
        if isinstance(point["value"], int):
            added.as_int = point["value"]
        else:
            added.as_double = point["value"]
        if "state" in point:
            added.attributes.add(key="state").value.string_value = point["state"]
    with grpc.insecure_channel(address) as channel:
        stub = MetricsServiceStub(channel)  # type: ignore[no-untyped-call]
        refused = stub.Export(request, timeout=30).partial_success
    if refused.rejected_data_points:
        return [f"refused: {refused.error_message}"]
    with connect(store.settings) as connected:
        rows = connected.window(node).read()
    got = {
        column: {"unit": unit, "value": value}
        for column, unit, value in zip(
            rows.columns, rows.units, rows.values_tf[0].tolist(), strict=True
        )
    }
    return lacking(need["columns"], got, "columns")


@pytest.fixture(scope="module")
def bridge(store: StoreProcesses) -> Iterator[str]:
    with serving("icos_fl_otlp_bridge", "ICOS_FL_BRIDGE", store) as address:
        yield address


def test_bridge(bridge: str, store: StoreProcesses, need_of_otlp_bridge: Need, lacking: Lacking):
    assert unmet_by_bridge(bridge, store, need_of_otlp_bridge, lacking) == []


# The store


def plain(value: Any) -> Any:
    """What a store answers, as TOML has it."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    if dataclasses.is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    return value


def arguments(step: Mapping[str, Any], kept: Any) -> dict[str, Any]:
    given = {
        key: kept if value == "<kept>" else value
        for key, value in step.items()
        if key not in ("call", "answer", "answer_has", "keep", "fails")
    }
    if step["call"] == "append":
        given |= {
            "times_ns_t": np.array(given["times_ns_t"]),
            "values_tf": np.array(given["values_tf"]),
        }
    if step["call"] == "put":
        weights = {name: np.array(values, np.float32) for name, values in given["weights"].items()}
        return {"version": ModelVersion(**(given | {"weights": weights}))}
    return given


def unmet_by_store(connected: Store, need: Need, lacking: Lacking) -> list[str]:
    on: Any = connected
    kept: Any = None
    unmet: list[str] = []
    for step in need["steps"]:
        call = step["call"]
        given = arguments(step, kept)
        of = connected if hasattr(connected, call) else on
        if "fails" in step:
            with pytest.raises(getattr(store_errors, step["fails"])):
                getattr(of, call)(**given)
            continue
        answer = getattr(of, call)(**given)
        if call in ("create_window", "model_state"):
            on = answer
        if "keep" in step:
            kept = getattr(answer, step["keep"])
        if "answer" in step:
            unmet += lacking(step["answer"], plain(answer), call)
        if "answer_has" in step and step["answer_has"] not in answer:
            unmet.append(f"{call}: {answer!r} has no {step['answer_has']!r}")
    return unmet


def test_store(store: StoreProcesses, need_of_timeseries_store: Need, lacking: Lacking):
    with connect(store.settings) as connected:
        assert unmet_by_store(connected, need_of_timeseries_store, lacking) == []


# The ClientApp


def test_client(store: StoreProcesses, processor: str, need_of_fl_client: Need, lacking: Lacking):
    need = need_of_fl_client
    node_config = {
        "node-name": NODE,
        "processor-address": processor,
        "store-address": f"127.0.0.1:{store.settings.port}",
    }
    run_config = {"metric": "power", "time-step": 4, "horizon": 2, "local-epochs": 1,
                  "train-test-split": 0.75}  # fmt: skip
    context = Context(
        run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config=run_config
    )

    def ask(kind: str, config: Mapping[str, Any], arrays: np.ndarray | None) -> RecordDict:
        content = RecordDict({"config": ConfigRecord(dict(config))})
        if arrays is not None:
            content["arrays"] = ArrayRecord({"weights": Array(arrays)})
        # As a SuperNode hands it on.
        metadata = Metadata(
            run_id=1, message_id="m", src_node_id=1, dst_node_id=2, reply_to_message_id="",
            group_id="", created_at=time.time(), ttl=600.0, message_type=kind, src_task_id=1,
            dst_task_id=2,
        )  # fmt: skip
        return app(Message(content=content, metadata=metadata), context).content

    # Weights are what the node itself offers.
    offer = ask("query", {"protocol": 2, "server-round": 0, "metrics": ["power"]}, None)
    config, weights = need["config"], None
    if need["message"] != "query":
        config |= {key: offer["node"][key] for key in ("weights-metrics", "weights-layouts")}
        weights = offer["arrays"]["weights"].numpy()
    reply = ask(need["message"], config, weights)

    got = {
        "node": dict(reply["node"]),
        "metrics": dict(reply["metrics"]),
        "arrays": list(reply["arrays"]),
    }
    needed = {record: need[record] for record in got}
    assert lacking(needed, got, need["message"]) == []


# Providers that break their contract

POWER = """\
    sources:
      - terms:
          - metric: scaph_host_power_microwatts
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Sources of processor, bridge and protos, to be broken."""
    for sources in ("packages/processor/src", "packages/otlp-bridge/src", "protos/src"):
        shutil.copytree(ROOT / sources, tmp_path / "src", dirs_exist_ok=True)
    shutil.copytree(ROOT / "protos/icos_fl", tmp_path / "protos/icos_fl")
    return tmp_path


def change(file: Path, was: str, becomes: str) -> None:
    text = file.read_text()
    assert was in text
    file.write_text(text.replace(was, becomes))


def test_a_renamed_field_is_caught(
    copied: Path, store: StoreProcesses, lacking: Lacking, needs_of: Callable[[str], list[Need]]
):
    proto = copied / "protos/icos_fl/processor/v1/processor_service.proto"
    change(proto, "standard_deviation", "deviation")
    change(copied / "src/icos_fl_processor/convert.py", "standard_deviation=", "deviation=")
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{copied / 'protos'}",
         f"--python_out={copied / 'src'}", str(proto)],
        check=True,
    )  # fmt: skip
    with serving("icos_fl_processor", "ICOS_FL_PROCESSOR", store, copied / "src") as address:
        lines = [unmet(address, PROCESSOR, need, lacking) for need in needs_of("processor")]
    assert [line for each in lines for line in each] == [
        "GetSequences[0].header.columns[0].standard_deviation: missing",
        "GetSequences[0].header.columns[1].standard_deviation: missing",
    ]


@pytest.mark.parametrize(
    ("was", "becomes", "told"),
    [
        ("  cpu_usage:", "  cpu_load:", ["columns.cpu_usage: missing"]),
        (
            f"unit: W\n{POWER}        divide_by: 1000000",
            f"unit: mW\n{POWER}        divide_by: 1000",
            [
                "columns.power_consumption.unit: 'mW', needed is 'W'",
                "columns.power_consumption.value: 146830.0, needed is 146.83",
            ],
        ),
    ],
    ids=["removed column", "changed unit"],
)
def test_a_column_that_is_gone_or_in_another_unit_is_caught(
    copied: Path,
    store: StoreProcesses,
    lacking: Lacking,
    needs_of: Callable[[str], list[Need]],
    was: str,
    becomes: str,
    told: list[str],
):
    change(copied / "src/icos_fl_otlp_bridge/default.yaml", was, becomes)
    with serving("icos_fl_otlp_bridge", "ICOS_FL_BRIDGE", store, copied / "src") as address:
        unmet = [unmet_by_bridge(address, store, need, lacking) for need in needs_of("otlp-bridge")]
    assert [line for lines in unmet for line in lines] == told
