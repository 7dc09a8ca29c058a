"""What ``icos-fl certs node`` makes is what the processor and fl-client take."""

import os
from pathlib import Path

import pytest
from icos_fl_client.credentials import Credentials
from icos_fl_client.errors import ProcessorUnavailable
from icos_fl_client.processor_client import ProcessorClient
from icos_fl_local import certs
from icos_fl_processor.server import Server
from icos_fl_service.security import TlsSettings, load_security
from icos_fl_timeseries_store import MemoryStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certs.make(tmp_path / "certs", "node", ["edge-1"], [], days=1, uid=os.getuid())
    return tmp_path / "certs"


def test_a_node_trusts_its_processor_and_is_known_to_it(folder):
    store = MemoryStore()
    store.create_window("edge-1")
    server = Server(
        lambda: store,
        "127.0.0.1:0",
        security=load_security(
            TlsSettings(
                certificate=folder / "processor.pem",
                key=folder / "processor.key",
                client_ca=folder / "ca.pem",
            ),
            None,
        ),
    )
    server.start()
    address = f"localhost:{server.port}"
    shown = Credentials(folder / "ca.pem", folder / "fl-client.pem", folder / "fl-client.key")
    try:
        with ProcessorClient(address, credentials=shown) as client:
            assert client.nodes() == ["edge-1"]
        with (
            ProcessorClient(
                address, wait_for_ready=False, credentials=Credentials(folder / "ca.pem")
            ) as client,
            pytest.raises(ProcessorUnavailable, match="asks for a client's certificate"),
        ):
            client.nodes()
    finally:
        server.stop(0)
