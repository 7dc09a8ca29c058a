"""What somebody on the federation's network can do; runs in a container of the image fl-server.

Reads what there is as JSON from standard input, and prints what it found.
"""

import concurrent.futures
import json
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

CA = "/run/gateway-ca.pem"


def main() -> None:
    """Everything once."""
    given = json.loads(sys.stdin.read())
    gateway = given["gateway"]
    found = {
        "reached": reached([tuple(target) for target in given["targets"]]),
        "answers": {path: status(gateway, path) for path in given["paths"]},
        "unknown key": unknown_key(gateway, Path(CA).read_bytes()),
        "wrong authority": wrong_authority(gateway, given["other_authority"].encode()),
        "run": strangers_run(gateway),
    }
    print(json.dumps(found))


def reached(targets: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those of *targets* that take a connection."""
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        taken = [*pool.map(connects, targets)]
    return [target for target, yes in zip(targets, taken, strict=True) if yes]


def connects(target: tuple[str, int]) -> bool:
    try:
        socket.create_connection(target, 3).close()
    except OSError:
        return False
    return True


def status(address: str, path: str) -> str:
    """Of a POST to *path* there, over TLS, whoever answers."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    head = "Content-Type: application/protobuf\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    try:
        with (
            socket.create_connection((host, int(port)), 10) as plain,
            context.wrap_socket(plain) as secure,
        ):
            secure.sendall(f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{head}".encode())
            return (secure.recv(100).split() or [b"", b"closed"])[1].decode()
    except OSError as error:
        return type(error).__name__


def unknown_key(gateway: str, authority: bytes) -> str:
    """How a node is answered whose key nobody registered."""
    return asked(gateway, authority)


def wrong_authority(gateway: str, authority: bytes) -> str:
    """What a node says of the gateway that trusts another authority."""
    return asked(gateway, authority)


def asked(gateway: str, authority: bytes) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    key = ec.generate_private_key(ec.SECP384R1())
    client: Any = FleetHttpClient.from_server_address(
        gateway,
        insecure=False,
        root_certificates=authority,
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
    )
    request = ActivateNodeRequest(
        public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30
    )
    try:
        with client:
            return f"taken as {client.ActivateNode(request).node_id}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def strangers_run(gateway: str) -> str:
    """What ``flwr run`` says, of the app that the image has."""
    home = Path("/tmp/flwr")  # noqa: S108 - of a container alone
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "theirs"\n'
        f'[superlink.theirs]\naddress = "{gateway}"\nroot-certificates = "{CA}"\n'
    )
    done = subprocess.run(
        ["flwr", "run", "/opt/icos-fl-app", "theirs", "--format", "json"],  # noqa: S607
        env=os.environ | {"FLWR_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()
