"""Where calls go and with which key: checked before anything is sent, shown without secrets."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import SplitResult, parse_qsl, urlsplit

from saetool.errors import BackendError, ConfigError
from saetool.llm.wire import Wire

HIDDEN = "[hidden]"


@dataclass(frozen=True)
class Endpoint:
    """A checked base URL and its key. ``repr`` shows no secret."""

    host: str
    """Host and port, for people and records."""
    base: str = field(repr=False)
    """Scheme, user, host and path, without a slash at the end."""
    query: str = field(repr=False)
    key: str | None = field(repr=False)
    key_variable: str
    secrets: tuple[str, ...] = field(repr=False)

    def url(self, path: str) -> str:
        return f"{self.base}{path}{'?' + self.query if self.query else ''}"

    def redact(self, text: str) -> str:
        """``text`` without any secret, on one line."""
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return " ".join(text.split())


def endpoint(
    wire: Wire, base_url: str | None, *, allow_http: bool, environment: Mapping[str, str] | None = None
) -> Endpoint:
    """The endpoint of ``wire``: at ``base_url``, else where its environment variable says, else its own.

    Raises ``ConfigError`` for an address that cannot be used, ``BackendError`` where a key is needed and not set.
    """
    environment = os.environ if environment is None else environment
    given = base_url or environment.get(wire.url_variable) or wire.base_url
    named = "--base-url" if base_url else wire.url_variable
    parts, host = _parse(given, named)
    local = _is_loopback(parts.hostname or "")
    if parts.scheme == "http" and not local and not allow_http:
        raise ConfigError(
            f"{named}: http to {host} would send the key and the texts in the clear",
            "use https, or pass --allow-http",
        )
    key = (environment.get(wire.key_variable) or "").strip() or None
    if key and not (key.isascii() and key.isprintable()):
        raise BackendError(f"{wire.key_variable}: holds characters that no key has", "set it again")
    if key is None and given.rstrip("/") == wire.base_url:
        raise BackendError(f"{wire.key_variable} is not set", f"export {wire.key_variable}=…; keys are read from there")
    hidden = [key, parts.password, parts.username if parts.password else None]
    hidden += [value for _, value in parse_qsl(parts.query) if len(value) >= 8]
    secrets = tuple(sorted({s for s in hidden if s}, key=len, reverse=True))
    base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    return Endpoint(host, base, parts.query, key, wire.key_variable, secrets)


def _parse(given: str, named: str) -> tuple[SplitResult, str]:
    try:
        parts = urlsplit(given)
        port = parts.port
    except ValueError:
        raise ConfigError(f"{named}: is no address", "example: https://api.openai.com/v1") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{named}: is no http(s) address", "example: https://api.openai.com/v1")
    return parts, parts.hostname + (f":{port}" if port else "")


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
