"""``icos-fl node join``: make this machine a node of a federation.

The key is made here and stays here; what travels is its public half, the name and the secret of the
invitation, to a gateway whose certificate the authority in the invitation has signed.
"""

import base64
import http.client
import json
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from icos_fl_local.errors import LocalError, UsageError
from icos_fl_local.files import refused, write

_PREFIX = "icosfl1."
_TIMEOUT_SECONDS = 30.0
_ANSWER_BYTES_MAX = 65_536

KEY, PUBLIC_KEY, AUTHORITY, SETTINGS = (
    "supernode.key",
    "supernode.pub",
    "gateway-ca.pem",
    "node.env",
)


@dataclass(frozen=True)
class Invitation:
    """What ``icos-fl node invite`` printed."""

    gateway: str
    """host:port"""
    name: str
    secret: str
    expires_unix_s: float
    authority: str
    """PEM of who signed the gateway's certificate."""


def parse(word: str) -> Invitation:
    """Raises UsageError."""
    packed = "".join(word.split()).removeprefix(_PREFIX)  # a terminal may have broken the line
    try:
        facts = json.loads(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)))
        der = base64.b64decode(facts["authority"])
        return Invitation(
            facts["gateway"],
            facts["name"],
            facts["secret"],
            facts["expires_unix_s"],
            ssl.DER_cert_to_PEM_cert(der),
        )
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            "this is no invitation, or not all of it; 'icos-fl node invite NAME' at the controller "
            "prints one as a single long word"
        ) from None


def join(word: str, folder: Path, uid: int) -> list[str]:
    """Join, and leave in *folder* what a SuperNode needs, owned by *uid* (-1: who runs this).

    Made again with the same invitation it does the same again. Raises LocalError.
    """
    invitation = parse(word)
    public_key = _public_key(folder, uid)
    answer = _enrol(invitation, public_key)
    write(folder / AUTHORITY, invitation.authority.encode(), 0o644, uid)
    settings = {"ICOS_FL_NODE_NAME": answer["name"], "ICOS_FL_NODE_SUPERLINK": answer["superlink"]}
    lines = "".join(f"{name}={value}\n" for name, value in settings.items())
    write(folder / SETTINGS, lines.encode(), 0o644, uid)
    return [
        f"{answer['name']} is node {answer['node_id']} of the federation at {answer['superlink']}",
        f"its key is {folder / KEY}, its settings are {folder / SETTINGS}",
    ]


def _public_key(folder: Path, uid: int) -> str:
    """Of the key in *folder*, which is made if there is none, in OpenSSH's form."""
    path = folder / KEY
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        write(
            path,
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.OpenSSH,
                serialization.NoEncryption(),
            ),
            0o600,
            uid,
        )
    try:
        found = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise refused(path, "read", error) from None
    except ValueError:
        raise LocalError(
            f"{path}: no private key in OpenSSH's form; delete it, and join with a new one"
        ) from None
    public = found.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    write(folder / PUBLIC_KEY, public + b"\n", 0o644, uid)
    return public.decode()


def _enrol(invitation: Invitation, public_key: str) -> dict[str, str]:
    body = {
        "name": invitation.name,
        "secret": invitation.secret,
        "public_key": public_key,
        "time_unix_s": time.time(),
    }
    status, text = _post(invitation, json.dumps(body))
    try:
        answer: dict[str, str] = json.loads(text)
        if status == http.HTTPStatus.OK:
            return {key: str(answer[key]) for key in ("name", "node_id", "superlink")}
        raise LocalError(f"{answer['message']} ({invitation.gateway}: {answer['error']})")
    except (ValueError, KeyError, TypeError):
        pass
    if status == http.HTTPStatus.TOO_MANY_REQUESTS:
        raise LocalError(f"the gateway at {invitation.gateway} is asked too often: wait a minute")
    raise LocalError(
        f"what answers at {invitation.gateway} takes no nodes in now (HTTP status {status}): is "
        "that the gateway, and does the enrolment service behind it run?"
    )


def _post(invitation: Invitation, body: str) -> tuple[int, str]:
    context = ssl.create_default_context(cadata=invitation.authority)
    connection = http.client.HTTPSConnection(
        invitation.gateway, timeout=_TIMEOUT_SECONDS, context=context
    )
    try:
        connection.request("POST", "/enrol", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read(_ANSWER_BYTES_MAX).decode(errors="replace")
    except ssl.SSLCertVerificationError as error:
        raise LocalError(
            f"the gateway at {invitation.gateway} is not the one that the invitation is for: "
            f"{error.verify_message}. This machine's clock says "
            f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise LocalError(f"the gateway at {invitation.gateway} does not answer: {reason}") from None
    finally:
        connection.close()
