"""``icos-fl-server node``: invite, list and remove nodes, at the controller."""

import json
import ssl
import sys
import time
from datetime import UTC, datetime

from icos_fl_timeseries_store.names import checked_name

from icos_fl_server.enrolment import invitations
from icos_fl_server.enrolment.invitations import Invitation, Invitations
from icos_fl_server.enrolment.settings import EnrolmentSettings
from icos_fl_server.enrolment.superlink import REMOVED, SuperLink
from icos_fl_server.errors import ServerError


def invite(settings: EnrolmentSettings, name: str, hours: float) -> None:
    """Print an invitation. Raises ServerError, Refused, InvalidRows and OSError."""
    checked_name(name)
    if not settings.gateway:
        raise ServerError("ICOS_FL_ENROLMENT_GATEWAY: host:port of the gateway is needed")
    if not 0 < hours <= 24 * 365:
        raise ServerError(f"--hours {hours:g}: above 0 and at most 8,760 are possible")
    superlink = _superlink(settings)
    authority = ssl.PEM_cert_to_DER_cert(settings.authority.read_text())
    if any(node.name == name and node.state != REMOVED for node in superlink.nodes()):
        raise ServerError(
            f"a node is registered as {name}; to have another take its place, first "
            f"'icos-fl node remove {name}'"
        )
    kept = Invitations(settings.folder)
    with kept.locked():
        secret, expires_unix_s = kept.invite(name, hours * 3600)
    print(invitations.text(settings.gateway, name, secret, expires_unix_s, authority))
    print(
        f"for {name}, once, until {_time(expires_unix_s)}: it is a secret; on the node, give it to "
        "'icos-fl node join -'",
        file=sys.stderr,
    )


def show(settings: EnrolmentSettings, *, as_json: bool) -> None:
    """Print all nodes, and who is invited. Raises Refused and OSError."""
    nodes = [node for node in _superlink(settings).nodes() if node.state != REMOVED]
    kept = Invitations(settings.folder)
    with kept.locked():
        # One that was used is a node, or is about to become one.
        names = {node.name for node in nodes}
        invited = [invitation for invitation in kept.all() if invitation.name not in names]
    rows = [
        {
            "name": node.name,
            "state": node.state,
            "since": node.since,
            "node_id": str(node.node_id),
            "key": node.fingerprint,
        }
        for node in sorted(nodes, key=lambda node: node.name)
    ] + [_invited(invitation) for invitation in invited]
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['name']:20} {row['state']:10} {row['since']:25.25} {row['key']}".rstrip())
    if not rows:
        print("no node; invite one: icos-fl node invite NAME")


def remove(settings: EnrolmentSettings, name: str) -> None:
    """Let no key of *name* in any more, nor its invitation. Raises ServerError, Refused."""
    superlink = _superlink(settings)
    checked_name(name)
    kept = Invitations(settings.folder)
    with kept.locked():  # nobody joins meanwhile
        nodes = [node for node in superlink.nodes() if node.state != REMOVED]
        found = [node for node in nodes if node.name == name]
        for node in found:
            superlink.remove(node.node_id)
        if not kept.forget(name) and not found:
            names = ", ".join(sorted(node.name for node in nodes)) or "none"
            raise ServerError(f"no node {name!r}, and no invitation for it; there are: {names}")
    for node in found:
        print(f"removed {name}: node {node.node_id}, key {node.fingerprint}")
    if not found:
        print(f"withdrew the invitation of {name}")


def _superlink(settings: EnrolmentSettings) -> SuperLink:
    try:
        settings.authority.read_bytes()
    except OSError as error:
        raise ServerError(
            f"ICOS_FL_ENROLMENT_AUTHORITY: {settings.authority}: cannot be read: {error.strerror}; "
            "run it where the enrolment service runs, or give its settings"
        ) from None
    return SuperLink(settings.superlink, settings.authority)


def _invited(invitation: Invitation) -> dict[str, str]:
    state = "expired" if time.time() > invitation.expires_unix_s else "invited"
    return {
        "name": invitation.name,
        "state": "joining" if invitation.public_key else state,
        "since": f"until {_time(invitation.expires_unix_s)}",
        "node_id": "",
        "key": "",
    }


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds")
