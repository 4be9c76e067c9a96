"""``dvd keys``: the certificates of one deployment, one pair for each role.

    DIR/ca.key                        signs; leaves this machine for no other
    DIR/ca.crt                        whom all of them believe
    DIR/ROLE/{ca.crt,tls.crt,tls.key} what goes to the machines of that role

Only ``add`` and ``renew`` need ``ca.key``: it may lie offline meanwhile.
"""

import ipaddress
import os
import re
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.service.errors import ConfigError
from common.service.keys import CA_FILE, CERTIFICATE_FILE, KEY_FILE
from common.service.roles import ROLES, Role, is_role_name, role_name, roles_in
from deploy.settings import KeysSettings

CA_KEY_FILE: Final = "ca.key"
_CA_DAYS: Final = 3650
_SKEW: Final = timedelta(hours=1)
"""Clocks of other machines may be behind ours."""
_USAGE: Final = "dvd keys init DIR | add DIR NAME --role ROLE | renew DIR"
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?")
_HOST: Final = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"
)
_USERS: Final[dict[Role, str]] = {
    "router": "machines with a router: dvd router --keys",
    "vision": "machines with vision servers: dvd vision --keys",
    "language": "machines with language servers: dvd language --keys",
    "client": "whoever only looks: dvd encode --server --keys",
}

_Names = Sequence[x509.GeneralName]


def main(settings: KeysSettings, words: Sequence[str]) -> int:
    """Returns 0, or raises ConfigError: nothing was written over."""
    actions: dict[str, tuple[int, Callable[..., None]]] = {"init": (1, _init), "add": (2, _add), "renew": (1, _renew)}
    action, *rest = words or [""]
    if action not in actions or len(rest) != actions[action][0]:
        raise ConfigError(f"expected {_USAGE}")
    if settings.role is not None and action != "add":
        raise ConfigError(f"--role is for dvd keys add; dvd keys {action} makes those of every role")
    actions[action][1](settings, Path(rest[0]), *rest[1:])
    return 0


def _init(settings: KeysSettings, root: Path) -> None:
    for path in (root / CA_KEY_FILE, root / CA_FILE, *(root / role for role in ROLES)):
        if path.exists():
            raise ConfigError(f"{path} is there already: dvd keys add or renew go on with it; nothing was changed")
    names = _host_names(settings.hosts)
    _make_directory(root)
    authority = _Authority.create(root)
    for role in ROLES:
        authority.write_pair(root / role, role, names, settings.days)
    print(f"{root / CA_KEY_FILE}: keep it to yourself: whoever has it can be any server of this deployment")
    for role in ROLES:
        print(f"{root / role}: to {_USERS[role]} DIR")
    print(f"valid until {_end(settings.days)}; dvd keys renew {root} makes others in time")


def _add(settings: KeysSettings, root: Path, name: str) -> None:
    if settings.role is None:
        raise ConfigError(f"--role is required: one of {', '.join(ROLES)}")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name[:64]}: expected a name of lower-case letters, digits, dots and dashes")
    if (root / name).exists():
        raise ConfigError(f"{root / name} is there already: dvd keys renew makes a new one; nothing was changed")
    _Authority.open(root).write_pair(root / name, settings.role, _host_names(settings.hosts), settings.days)
    print(f"{root / name}: to {_USERS[settings.role]} DIR; valid until {_end(settings.days)}")


def _renew(settings: KeysSettings, root: Path) -> None:
    """New keys and certificates for the same names, in place of all that were made here."""
    if settings.hosts:
        raise ConfigError("--hosts is for init and add: renewed certificates are for the same names as before")
    authority = _Authority.open(root)
    found = [(path.parent, *_subject_of(path)) for path in sorted(root.glob(f"*/{CERTIFICATE_FILE}"))]
    for directory, role, hosts in found:
        authority.write_pair(directory, role, hosts, settings.days)
        print(f"{directory}: renewed until {_end(settings.days)}; to {_USERS[role]} DIR")


class _Authority:
    """The one that signs."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, root: Path) -> "_Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        # Two deployments never have the same: messages tell them apart.
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"dvd deployment {secrets.token_hex(4)}")])
        usage = _key_usage(is_authority=True)
        builder = _builder(name, name, key, _CA_DAYS).add_extension(x509.BasicConstraints(True, 0), critical=True)
        certificate = builder.add_extension(usage, critical=True).sign(key, hashes.SHA256())
        _write(root / CA_KEY_FILE, _private_pem(key), 0o600)
        _write(root / CA_FILE, certificate.public_bytes(Encoding.PEM), 0o644)
        return cls(certificate, key)

    @classmethod
    def open(cls, root: Path) -> "_Authority":
        """Raises ConfigError: there is none in this directory."""
        try:
            certificate = x509.load_pem_x509_certificate((root / CA_FILE).read_bytes())
            key = load_pem_private_key((root / CA_KEY_FILE).read_bytes(), None)
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}; dvd keys init makes it") from None
        except (ValueError, TypeError):
            raise ConfigError(f"{root}: {CA_FILE} or {CA_KEY_FILE} is not what dvd keys init made") from None
        if key.public_key() != certificate.public_key():
            raise ConfigError(f"{root / CA_KEY_FILE}: not the key of {CA_FILE}")
        return cls(certificate, cast(ec.EllipticCurvePrivateKey, key))

    def write_pair(self, directory: Path, role: Role, hosts: _Names, days: int) -> None:
        """Key first: whoever reads in between has a certificate that does not fit, notices, and reads again."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, directory.name)])
        names = x509.SubjectAlternativeName([x509.DNSName(role_name(role)), *hosts])
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([] if role == "client" else [ExtendedKeyUsageOID.SERVER_AUTH])]
        issuer_key = cast(ec.EllipticCurvePublicKey, self._certificate.public_key())
        builder = _builder(subject, self._certificate.subject, key, days)
        builder = builder.add_extension(x509.BasicConstraints(False, None), critical=True)
        builder = builder.add_extension(_key_usage(is_authority=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        builder = builder.add_extension(names, critical=False)
        builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        _make_directory(directory)
        _write(directory / KEY_FILE, _private_pem(key), 0o600)
        _write(directory / CERTIFICATE_FILE, certificate.public_bytes(Encoding.PEM), 0o644)
        _write(directory / CA_FILE, self._certificate.public_bytes(Encoding.PEM), 0o644)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - _SKEW).not_valid_after(now + timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _key_usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _host_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Raises ConfigError for what is neither a name nor an address, and for names that are kept for roles."""
    found: list[x509.GeneralName] = []
    for host in hosts:
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(host.strip("[]"))))
        except ValueError:
            if not _HOST.fullmatch(host) or is_role_name(host):
                raise ConfigError(f"--hosts {host[:64]}: expected a host name or an IP address") from None
            found.append(x509.DNSName(host))
    return found


def _subject_of(path: Path) -> tuple[Role, _Names]:
    """What a certificate is for: its role, and its hosts. Raises ConfigError."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        names = list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (OSError, ValueError, x509.ExtensionNotFound):
        names = []
    roles = roles_in(name.value for name in names if isinstance(name, x509.DNSName))
    if len(roles) != 1:
        raise ConfigError(f"{path}: not made by dvd keys; nothing was changed")
    (role,) = roles
    return role, [name for name in names if name.value != role_name(role)]


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _write(path: Path, content: bytes, mode: int) -> None:
    """At once or not at all, and never readable by more users than it shall be."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _end(days: int) -> str:
    return (datetime.now(UTC) + timedelta(days=days)).date().isoformat()
