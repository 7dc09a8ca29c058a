"""Invitations: what is given to a node, and what is kept of it here."""

import base64
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from icos_fl_server.enrolment.refusals import Reason, Refused

SECRET_BYTES = 32
_PREFIX = "icosfl1."


def text(gateway: str, name: str, secret: str, expires_unix_s: float, authority: bytes) -> str:
    """What a node is given, as one word; *authority* is a certificate in DER."""
    facts = {
        "gateway": gateway,
        "name": name,
        "secret": secret,
        "expires_unix_s": int(expires_unix_s),
        "authority": base64.b64encode(authority).decode(),
    }
    packed = json.dumps(facts, separators=(",", ":")).encode()
    return _PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")


@dataclass(frozen=True)
class Invitation:
    """What is kept: nothing by which one could join."""

    name: str
    secret_sha256: str
    expires_unix_s: float
    public_key: str = ""
    """Who has used it: an OpenSSH public key."""


class Invitations:
    """Those in *folder*, a file each; the service and who invites use it at the same time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Everything below is to be done in this."""
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def invite(self, name: str, seconds: float) -> tuple[str, float]:
        """A secret and when it expires; an older invitation of that name is void."""
        secret, expires_unix_s = secrets.token_urlsafe(SECRET_BYTES), time.time() + seconds
        self._write(Invitation(name, _digest(secret), expires_unix_s))
        return secret, expires_unix_s

    def check(self, name: str, secret: str, public_key: str) -> None:
        """Raises Refused unless *public_key* may join by this secret."""
        found = self._read(self._path(name))
        kept = found.secret_sha256 if found else _digest("")
        # As long for a good guess as for a bad one, and the same for a name that nobody has.
        if not hmac.compare_digest(kept, _digest(secret)) or found is None:
            raise Refused(
                Reason.INVITATION_UNKNOWN,
                "no such invitation, or a newer one took its place; ask for another: "
                "icos-fl node invite NAME, at the controller",
            )
        if found.public_key == public_key:
            return
        if found.public_key:
            raise Refused(
                Reason.INVITATION_USED,
                f"the invitation of {name} was used by another key and is good for one; ask for "
                f"another: icos-fl node invite {name}, at the controller",
            )
        if time.time() > found.expires_unix_s:
            ago = (time.time() - found.expires_unix_s) / 60
            raise Refused(
                Reason.INVITATION_EXPIRED,
                f"the invitation of {name} expired {ago:.0f} min ago; ask for another: "
                f"icos-fl node invite {name}, at the controller",
            )

    def use(self, name: str, public_key: str) -> None:
        """From now on it is good for *public_key* alone."""
        found = self._read(self._path(name))
        if found:
            self._write(replace(found, public_key=public_key))

    def forget(self, name: str) -> bool:
        """Was there one?"""
        there = self._path(name).exists()
        self._path(name).unlink(missing_ok=True)
        return there

    def all(self) -> list[Invitation]:
        """Those that were used too, by name."""
        found = [self._read(path) for path in sorted(self._folder.glob("*.json"))]
        return [invitation for invitation in found if invitation]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _read(self, path: Path) -> Invitation | None:
        try:
            return Invitation(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None

    def _write(self, invitation: Invitation) -> None:
        """On disk before it counts: one that was used must stay so."""
        path = self._path(invitation.name)
        with tempfile.NamedTemporaryFile("w", dir=self._folder, delete=False) as stream:
            stream.write(json.dumps(asdict(invitation)))
            stream.flush()
            os.fsync(stream.fileno())
        Path(stream.name).replace(path)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
