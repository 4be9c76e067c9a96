"""HTTPS on the router's own port: the certificate that clients see. Between servers others are used (``--keys``)."""

import ssl
from pathlib import Path
from typing import Any

from cryptography import x509

from common.service.errors import ConfigError
from common.service.keys import watch_end
from router.settings import RouterSettings


def https_options(settings: RouterSettings) -> dict[str, Any]:
    """What uvicorn is told; nothing where plain HTTP is spoken.

    Raises:
        ConfigError: names the option whose file is missing, or is not what it should be.
    """
    if settings.ssl_certfile is None:
        return {}
    watch_end(settings.ssl_certfile, _certificate(settings.ssl_certfile).not_valid_after_utc)
    _check(settings)
    return {
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
        "ssl_ca_certs": settings.ssl_ca_certs,
        "ssl_cert_reqs": ssl.CERT_NONE if settings.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    }


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--ssl-certfile {path}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"--ssl-certfile {path}: not a certificate in PEM") from None


def _check(settings: RouterSettings) -> None:
    """As uvicorn will load them, which would only say that something failed."""
    assert settings.ssl_certfile is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    key = settings.ssl_keyfile or settings.ssl_certfile
    try:
        context.load_cert_chain(settings.ssl_certfile, key, password=_no_password)
    except OSError as error:  # those of ssl are some of them
        reason = "not the private key of --ssl-certfile, in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        option = "--ssl-keyfile" if settings.ssl_keyfile else "--ssl-certfile"
        raise ConfigError(f"{option} {key}: {reason}") from None
    if settings.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(settings.ssl_ca_certs)
        except OSError as error:
            reason = "no certificates in PEM" if isinstance(error, ssl.SSLError) else error.strerror
            raise ConfigError(f"--ssl-ca-certs {settings.ssl_ca_certs}: {reason}") from None


def _no_password() -> str:
    """Instead of a question on the terminal, in the middle of a start."""
    raise ConfigError("--ssl-keyfile: this key wants a password; a router that starts by itself cannot know it")
