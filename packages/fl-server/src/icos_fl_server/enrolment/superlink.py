"""The SuperLink's nodes, by Flower's Control API."""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

from icos_fl_server.enrolment.refusals import Reason, Refused

REMOVED = "unregistered"


@dataclass(frozen=True)
class Node:
    """One that the SuperLink knows, or knew."""

    node_id: int
    name: str
    state: str
    """``registered``, ``online``, ``offline`` or REMOVED."""
    since: str
    """When it came into that state, ISO 8601."""
    public_key: bytes
    """PEM."""

    @property
    def fingerprint(self) -> str:
        """As ``ssh-keygen -l`` tells it."""
        return fingerprint(bytes_to_public_key(self.public_key))


def public_key_of(line: str) -> ec.EllipticCurvePublicKey:
    """Of OpenSSH's form. Raises Refused unless it is a key of P-384."""
    try:
        key = serialization.load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise Refused(Reason.KEY_UNUSABLE, "no public key of ecdsa-sha2-nistp384 in OpenSSH's form")
    return key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """As ``ssh-keygen -l`` tells it."""
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    blob = base64.b64decode(key.public_bytes(*openssh).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


class SuperLink:
    """The one at *address*, whose certificate *authority* signed; None for one without TLS.

    All calls raise Refused.
    """

    def __init__(self, address: str, authority: Path | None) -> None:
        self._address = address
        self._authority = authority

    def nodes(self) -> list[Node]:
        """All that it knows, those that were removed too."""
        answer = self._call(lambda client: client.ListNodes(ListNodesRequest()))
        since = {
            "registered": "registered_at",
            "online": "last_activated_at",
            "offline": "last_deactivated_at",
            REMOVED: "unregistered_at",
        }
        return [
            Node(
                node.node_id,
                node.name,
                node.status,
                getattr(node, since.get(node.status, "registered_at")),
                node.public_key,
            )
            for node in answer.nodes_info
        ]

    def registered(self, key: ec.EllipticCurvePublicKey, name: str) -> int | None:
        """The id of the node with this key and name. Refused if one of them is in other hands."""
        public_key = public_key_to_bytes(key)
        for node in self.nodes():
            if node.public_key != public_key:
                if node.name == name and node.state != REMOVED:
                    raise Refused(
                        Reason.NAME_IN_USE,
                        f"another node is registered as {name}; remove it first: "
                        f"icos-fl node remove {name}, at the controller",
                    )
            elif node.state == REMOVED:
                raise Refused(
                    Reason.KEY_REMOVED,
                    f"this key was removed from the federation (as {node.name}), and a SuperLink "
                    "takes no key twice; delete it, and join with a new one",
                )
            elif node.name != name:
                raise Refused(Reason.KEY_IN_USE, f"this key is registered as {node.name} already")
            else:
                return node.node_id
        return None

    def register(self, key: ec.EllipticCurvePublicKey, name: str) -> int:
        """The new node's id."""
        request = RegisterNodeRequest(public_key=public_key_to_bytes(key), name=name)
        return int(self._call(lambda client: client.RegisterNode(request)).node_id)

    def remove(self, node_id: int) -> None:
        """Its key is refused from now on."""
        request = UnregisterNodeRequest(node_id=node_id)
        self._call(lambda client: client.UnregisterNode(request))

    def _call(self, call: Callable[[ControlHttpClient], Any]) -> Any:
        try:
            with ControlHttpClient.from_server_address(
                self._address,
                insecure=self._authority is None,
                root_certificates=self._authority.read_bytes() if self._authority else None,
                interceptors=[RuntimeVersionHttpInterceptor(component_name="icos-fl-server")],
            ) as client:
                return call(client)
        except httpx.HTTPStatusError as error:
            told = FlowerError.from_json(error.response.text)
            problem = str(told.message if told else error)
        except (httpx.TransportError, OSError, ValueError) as error:
            problem = str(error) or type(error).__name__
        raise Refused(
            Reason.SUPERLINK_AWAY, f"the SuperLink at {self._address} does not take it: {problem}"
        )
