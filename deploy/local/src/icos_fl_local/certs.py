"""``icos-fl certs``: a certificate authority in a folder, and what it signs.

A certificate is renewed for the key that it has, so that one rename replaces it: whoever reads
certificate and key meanwhile never finds two that do not fit.
"""

import contextlib
import datetime
import fcntl
import ipaddress
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from icos_fl_local.errors import LocalError, UsageError
from icos_fl_local.files import refused, write

SERVERS = {
    "controller": ("gateway", "superlink", "enrolment"),
    "node": ("otlp-bridge", "processor", "supernode"),
}
"""Who of a deployment needs a server's certificate, by the name that its network knows it by."""

CLIENTS = {"controller": (), "node": ("collector", "fl-client")}
"""Who shows a certificate to one of them."""

_EVERY_SERVER = ("localhost", "127.0.0.1", "::1")
_AUTHORITY = "ca"
_TAKEN = (_AUTHORITY, *(server for servers in SERVERS.values() for server in servers))
_AUTHORITY_DAYS = 3650
_UNCHANGED = -1
_CLOCKS_DIFFER = datetime.timedelta(hours=1)
_DNS = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*\Z")
_FILE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}\Z")


@dataclass(frozen=True)
class Certificate:
    """One file of the folder."""

    path: Path
    x509: x509.Certificate

    @property
    def usage(self) -> str:
        """``authority``, ``server`` or ``client``."""
        extensions = self.x509.extensions
        with contextlib.suppress(x509.ExtensionNotFound):
            if extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                return "authority"
            usages = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            if ExtendedKeyUsageOID.SERVER_AUTH in usages:
                return "server"
        return "client"

    @property
    def names(self) -> tuple[str, ...]:
        """DNS names and IP addresses that it is good for."""
        try:
            found = self.x509.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except x509.ExtensionNotFound:
            return ()
        return tuple(
            str(name.value)
            for name in found.value
            if isinstance(name, x509.DNSName | x509.IPAddress)
        )

    @property
    def until(self) -> datetime.datetime:
        """When it expires."""
        return self.x509.not_valid_after_utc

    def state(self, authority: "Certificate") -> str:
        """``ok``, ``due`` in its last third, or what makes it useless."""
        now = _now()
        begin = self.x509.not_valid_before_utc
        if now > self.until:
            return "expired"
        if now < begin:
            return "not yet valid"
        try:
            self.x509.verify_directly_issued_by(authority.x509)
        except (ValueError, TypeError, InvalidSignature):
            return "of another authority"
        key = self.path.with_suffix(".key")
        if key.exists() and _key(key).public_key() != self.x509.public_key():
            return "of another key"
        return "due" if self.until - now < (self.until - begin) / 3 else "ok"


def make(
    folder: Path, deployment: str, names: Sequence[str], clients: Sequence[str], days: int, uid: int
) -> list[str]:
    """Make what a *deployment* needs, renew what is due; a line for each file.

    *names* are those by which other machines reach this one. Without any, certificates keep the
    names that they have. *uid* owns all but the authority's files; -1 is who makes them.
    """
    outside = tuple(_checked(name) for name in names)
    for client in clients:
        if not _FILE.match(client):
            raise UsageError(f"--client {client}: a name of letters, digits, dots and hyphens")
        if client in _TAKEN:
            raise UsageError(f"--client {client}: another name than {', '.join(_TAKEN)}")
    if deployment == "controller" and not names and not (folder / "gateway.pem").exists():
        raise UsageError("give --name NAME, a DNS name or address by which nodes reach the gateway")
    with _locked(folder):
        lines = [] if (folder / f"{_AUTHORITY}.pem").exists() else [_make_authority(folder)]
        signer = _Signer(folder, days, uid)
        wanted = _as_they_are(folder)
        for server in SERVERS[deployment]:
            if names or server not in wanted:
                good_for = dict.fromkeys((*outside, server, *_EVERY_SERVER))
                wanted[server] = ("server", tuple(good_for))
        for client in (*CLIENTS[deployment], *clients):
            wanted.setdefault(client, ("client", (client,)))
        return lines + [signer.sign(name, *what) for name, what in wanted.items()]


def renew(folder: Path, days: int, uid: int, *, also_good: bool) -> list[str]:
    """Renew what is due, or with *also_good* every certificate; a line for each."""
    with _locked(folder):
        signer = _Signer(folder, days, uid, also_good=also_good)
        return [signer.sign(name, *what) for name, what in _as_they_are(folder).items()]


def show(folder: Path, *, as_json: bool) -> int:
    """Print names and expiry of each certificate; 1 if one is due or of no use, else 0."""
    authority = load(folder / f"{_AUTHORITY}.pem")
    rows = [
        {
            "file": str(found.path),
            "usage": found.usage,
            "names": list(found.names),
            "expires": found.until.isoformat(),
            "state": found.state(authority),
        }
        for found in everything(folder)
    ]
    if as_json:
        print(json.dumps(rows))
    else:
        for row, found in zip(rows, everything(folder), strict=True):
            print(_line(str(row["state"]), found))
    return 0 if all(row["state"] == "ok" for row in rows) else 1


def everything(folder: Path) -> list[Certificate]:
    """All certificates of the folder, the authority first."""
    paths = sorted(folder.glob("*.pem"), key=lambda path: (path.stem != _AUTHORITY, path))
    return [load(path) for path in paths]


def load(path: Path) -> Certificate:
    """Raises LocalError, which names the file and the cure."""
    try:
        return Certificate(path, x509.load_pem_x509_certificate(_read(path)))
    except ValueError:
        raise LocalError(f"{path}: no certificate in PEM; delete it, and it is made anew") from None


def _as_they_are(folder: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Usage and names of what the authority has signed."""
    return {
        found.path.stem: (found.usage, found.names)
        for found in everything(folder)
        if found.usage != "authority"
    }


class _Signer:
    """The authority of a folder."""

    def __init__(self, folder: Path, days: int, uid: int, *, also_good: bool = False) -> None:
        self._authority = load(folder / f"{_AUTHORITY}.pem")
        self._key = _key(folder / f"{_AUTHORITY}.key")
        self._days = days
        self._uid = uid
        self._also_good = also_good
        if self._authority.state(self._authority) not in ("ok", "due"):
            raise LocalError(
                f"{self._authority.path}: {self._authority.state(self._authority)}; make another "
                "authority with --folder NEW, and give its ca.pem to all who trust this one"
            )

    def sign(self, name: str, usage: str, names: tuple[str, ...]) -> str:
        """Make NAME.pem unless it is there and good; the line that tells it."""
        path, word = self._authority.path.with_name(f"{name}.pem"), "made"
        if path.exists():
            found = load(path)
            if (
                found.state(self._authority) == "ok"
                and not self._also_good
                and (found.usage, sorted(found.names)) == (usage, sorted(names))
                and path.with_suffix(".key").exists()
            ):
                return _line("kept", found)
            word = "renewed"
        key = _key_of(path.with_suffix(".key"), self._uid)
        server = usage == "server"
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        last = _now() + datetime.timedelta(days=self._days)
        issued = _certificate(
            name,
            key.public_key(),
            self._authority.x509.subject,
            self._key,
            min(last, self._authority.until),
            (_key_usage(is_authority=False), True),
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.ExtendedKeyUsage([purpose]), False),
            (x509.SubjectAlternativeName([_general_name(one) for one in names]), False),
        )
        write(path, issued.public_bytes(serialization.Encoding.PEM), 0o644, self._uid)
        return _line(word, Certificate(path, issued))


def _make_authority(folder: Path) -> str:
    key = _key_of(folder / f"{_AUTHORITY}.key", _UNCHANGED)
    last = _now() + datetime.timedelta(days=_AUTHORITY_DAYS)
    common_name = f"ICOS-FL {secrets.token_hex(4)}"  # two authorities can be told apart
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    issued = _certificate(
        common_name, key.public_key(), name, key, last,
        (_key_usage(is_authority=True), True),
        (x509.BasicConstraints(ca=True, path_length=0), True),
    )  # fmt: skip
    path = folder / f"{_AUTHORITY}.pem"
    write(path, issued.public_bytes(serialization.Encoding.PEM), 0o644, _UNCHANGED)
    return _line("made", Certificate(path, issued))


def _certificate(
    common_name: str,
    public_key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    signing_key: ec.EllipticCurvePrivateKey,
    last: datetime.datetime,
    *extensions: tuple[x509.ExtensionType, bool],
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _CLOCKS_DIFFER)
        .not_valid_after(last)
    )
    identifiers = (
        x509.SubjectKeyIdentifier.from_public_key(public_key),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()),
    )
    for extension, critical in (*extensions, *((one, False) for one in identifiers)):
        builder = builder.add_extension(extension, critical)
    return builder.sign(signing_key, hashes.SHA256())


def _key_usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_of(path: Path, uid: int) -> ec.EllipticCurvePrivateKey:
    """The key in *path*, which is made if it is not there."""
    if path.exists():
        return _key(path)
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write(path, pem, 0o600, uid)
    return key


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise LocalError(
            f"{path}: no elliptic curve key in PEM; put the right one there, or delete it and "
            f"{path.with_suffix('.pem').name} to have both made anew"
        )
    return key


def _checked(name: str) -> str:
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name))
    if not _DNS.match(name.lower()) or len(name) > 253:
        raise UsageError(f"--name {name}: neither a DNS name nor an IP address (without port)")
    return name.lower()


def _general_name(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def _line(word: str, found: Certificate) -> str:
    names = f" for {', '.join(found.names)}" if found.names else ""
    return f"{word:8} {found.path.name:16} {found.usage}{names}, until {found.until:%Y-%m-%d}"


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One at a time: of two, the second finds what the first has made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise refused(folder, "opened", error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        cure = "make it with 'icos-fl certs controller' or 'icos-fl certs node'"
        if path.name == f"{_AUTHORITY}.key":
            cure = "certificates are made where the authority's key is; copy it here for that"
        raise LocalError(f"{path}: is not there; {cure}") from None
    except OSError as error:
        raise refused(path, "read", error) from None
