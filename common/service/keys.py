"""Who this program is to the others of its deployment, and how it knows them: certificates of one authority.

``dvd keys init`` makes them. A directory holds ``ca.crt``, whom to believe, and ``tls.crt`` with ``tls.key``, who we
are: the names that Kubernetes gives to the files of a TLS secret. A certificate names a role, not a host, so that
servers may come and go anywhere (``common.service.roles``).
"""

import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from common.service import metrics
from common.service.errors import ConfigError
from common.service.roles import Role, role_name, roles_in

log = logging.getLogger(__name__)

CA_FILE: Final = "ca.crt"
CERTIFICATE_FILE: Final = "tls.crt"
KEY_FILE: Final = "tls.key"
_FILES: Final = (CA_FILE, CERTIFICATE_FILE, KEY_FILE)
_SOON: Final = timedelta(days=30)
_OTHERS: Final = 0o004

_ends: dict[Path, datetime] = {}
"""Of every certificate that this process shows."""

_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Pair:
    """What the three files held, all of it checked. In PEM."""

    ca: bytes
    certificate: bytes
    key: bytes
    expires: datetime


class Keys:
    """The keys of one program. Files that were replaced are read again for the next connection.

    Args:
        directory: holds the three files, or a directory of the role's name that does.
        role: what this program is.

    Raises:
        ConfigError: names the file and what is wrong: missing, expired, of another authority, for another role.
    """

    def __init__(self, directory: Path, role: Role) -> None:
        own = directory / role
        self._directory = own if own.is_dir() else directory
        self._role = role
        self._stamp = self._look()
        self._pair = self._read()
        self._generation = 0

    @classmethod
    def given(cls, directory: Path | None, role: Role) -> Self | None:
        """None where no directory was given."""
        return None if directory is None else cls(directory, role)

    @property
    def generation(self) -> int:
        """Another one once the files were replaced by others that are of use."""
        self._refresh()
        return self._generation

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server that lets in who has a certificate of the same authority."""

        def configuration() -> grpc.ServerCertificateConfiguration:
            pair = self._pair
            return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)], pair.ca)

        shown = self.generation

        def replaced() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            if shown == self.generation:
                return None
            shown = self._generation
            return configuration()

        return grpc.dynamic_ssl_server_credentials(configuration(), replaced, require_client_authentication=True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel. It keeps the pair of this moment: what replaces it is for later channels."""
        self._refresh()
        pair = self._pair
        return grpc.ssl_channel_credentials(pair.ca, pair.key, pair.certificate)

    def _refresh(self) -> None:
        """Read what has changed. If that is of no use, we go on with what we have."""
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return
            self._stamp = stamp  # before reading: what changes meanwhile is seen the next time
            self._pair = self._read()
        except ConfigError as error:
            log.warning("the keys stay as they were: %s", error.message)
            return
        self._generation += 1
        log.info("keys were replaced: valid until %s", _day(self._pair.expires))

    def _look(self) -> _Stamp:
        """What tells whether a file is another one."""
        found = []
        for name in _FILES:
            try:
                status = (self._directory / name).stat()
            except OSError as error:
                raise ConfigError(f"--keys {self._directory / name}: {error.strerror}; see dvd keys --help") from None
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)

    def _read(self) -> _Pair:
        authorities = _certificates(self._directory / CA_FILE)
        own = _certificates(self._directory / CERTIFICATE_FILE)
        key = _private_key(self._directory / KEY_FILE)
        self._check(own, authorities, key)
        expires = own[0].not_valid_after_utc
        watch_end(self._directory / CERTIFICATE_FILE, expires)
        # What was checked, not what the files hold by now.
        return _Pair(_pem(authorities), _pem(own), key, expires)

    def _check(self, own: list[x509.Certificate], authorities: list[x509.Certificate], key: bytes) -> None:
        path = self._directory / CERTIFICATE_FILE
        _check_time(path, own[0])
        issuers = [authority for authority in authorities if _is_issuer(authority, own[0])]
        for issuer in issuers:  # others may have ended: those of a deployment that this one takes the place of
            _check_time(self._directory / CA_FILE, issuer)
        if _public(load_pem_private_key(key, None).public_key()) != _public(own[0].public_key()):
            raise ConfigError(f"--keys {path}: {KEY_FILE} is not the key of this certificate")
        if len(own) == 1 and not issuers:  # with others in between, the other end judges
            raise ConfigError(f"--keys {path}: not signed by the authority in {CA_FILE}: they are of two deployments")
        roles = roles_in(_names(own[0]))
        if self._role not in roles:
            found = ", ".join(sorted(roles)) or "none"
            raise ConfigError(
                f"--keys {path}: it is for the role {found}, and this program is {self._role}: it must name"
                f" {role_name(self._role)}"
            )


def watch_end(path: Path, expires: datetime) -> None:
    """Let the metric tell when the first certificate of this process ends, and the log once that is soon."""
    _ends[path] = expires
    metrics.CERT_EXPIRY_TIMESTAMP_SECONDS.set(min(_ends.values()).timestamp())
    if expires - datetime.now(UTC) < _SOON:
        log.warning("%s expires on %s", path, _day(expires))


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_bytes(path))
    except ValueError:
        raise ConfigError(f"--keys {path}: not a certificate in PEM") from None


def _private_key(path: Path) -> bytes:
    content = _bytes(path)
    try:
        load_pem_private_key(content, None)
    except (ValueError, TypeError):  # TypeError: it wants a password
        raise ConfigError(f"--keys {path}: not a private key in PEM without a password") from None
    if os.stat(path).st_mode & _OTHERS:
        log.warning("every user of this machine can read %s", path)
    return content


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--keys {path}: {error.strerror}") from None


def _check_time(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        expired = _day(certificate.not_valid_after_utc)
        raise ConfigError(f"--keys {path}: expired on {expired}; dvd keys renew makes another")
    if now < certificate.not_valid_before_utc:
        begins = certificate.not_valid_before_utc.isoformat(timespec="seconds")
        raise ConfigError(f"--keys {path}: not valid before {begins}; is the clock of this machine right?")


def _is_issuer(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return extension.value.get_values_for_type(x509.DNSName)


def _public(key: object) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined,no-any-return]


def _pem(certificates: list[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _day(moment: datetime) -> str:
    return moment.date().isoformat()
