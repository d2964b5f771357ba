"""How a server is reached: its address, its key, and the proxies and certificates of the environment.

The proxy is that of HTTP_PROXY or HTTPS_PROXY, by the scheme of the server's address, or else that of
ALL_PROXY, as for curl. Servers on this machine, and those that NO_PROXY lists, are reached without one.
Certificates are those of SSL_CERT_FILE or SSL_CERT_DIR, or else the ones of certifi; `~/.netrc` is not read.

What cannot be used is refused before anything is sent, with the name of the variable at fault. The API key,
and the users and passwords in addresses, are secrets: no error shows them.
"""

from __future__ import annotations

import base64
import html
import ipaddress
import json
import os
import re
import socket
import ssl
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import quote
from urllib.request import getproxies

import httpx
from huggingface_hub import constants

from deepspec.errors import ServerError, causes, without_logins

API_KEY = "OPENAI_API_KEY"
"""The environment variable that holds the servers' key, if no other is named."""
THIS_MACHINE = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
TRUST = "name a file (PEM) with the certificate that signed it in the environment variable SSL_CERT_FILE"
REMEDIES = {
    **dict.fromkeys((62, 64), "give the server's address by a name that its certificate holds"),
    **dict.fromkeys((9, 10), "have the certificate renewed, or set this machine's clock"),
}
"""What helps by OpenSSL's code for what is wrong with a certificate, other than to trust it."""


@dataclass(frozen=True)
class Connection:
    """The way to one server. url: without user and password, for messages too; proxy: the variable that names
    the proxy on the way, None without one; secrets: {text: what messages say instead}."""

    url: str
    client: httpx.Client = field(repr=False)
    proxy: str | None
    secrets: Mapping[str, str] = field(repr=False)
    key_variable: str
    keyed: bool
    login: bool
    """The address has a user and password, which are sent instead of a key."""

    @property
    def via(self) -> str:
        return f" through the proxy that {self.proxy} names" if self.proxy else ""


def _api_key(variable: str) -> str:
    """The key in an environment variable; empty if `API_KEY` is not set. Raises ServerError."""
    name = re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII)
    if not name or (variable not in os.environ and variable != API_KEY):
        # Without the name: some give the key itself.
        raise ServerError(
            "--api-key-env does not name an environment variable that is set",
            next_step="export the variable, and give its name, not the key itself",
        )
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ServerError(
            f"the environment variable {variable} holds characters that no API key has",
            next_step=f"export {variable}=KEY again, in ASCII without white space",
        )
    return key


def connections(urls: Iterable[str], variable: str = API_KEY) -> list[Connection]:
    """The way to each server, with the key in the environment variable; an address given twice is one server.

    Nothing is sent. Raises ServerError for an address, a key, or an environment that cannot be used.
    """
    key, ways = _api_key(variable), dict[str, Connection]()
    for way in (_connect(url, key, variable) for url in urls):
        ways.setdefault(way.url, way)
    return list(ways.values())


def _connect(given: str, key: str, variable: str) -> Connection:
    url = _address(given)
    bare = str(url.copy_with(userinfo=b""))
    user, password = url.username, url.password
    secrets = {key: "[API key]", password or user: "[password]"}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if url.userinfo:
        if key:
            raise ServerError(
                f"the address has a user and password, and {variable} holds an API key: a server takes one "
                "of them",
                where=bare,
                next_step=f"unset {variable} for this command, or leave the user and password out",
            )
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        headers, secrets[basic] = {"Authorization": f"Basic {basic}"}, "[password]"
    found = _proxy_of(url)
    proxy = _usable_proxy(*found) if found else None
    if proxy and proxy.auth:
        secrets[proxy.auth[1] or proxy.auth[0]] = "[password]"
    secured = url.scheme == "https" or (proxy is not None and proxy.url.scheme == "https")
    # Reading certificates takes 20 ms and may fail, so it is left out where nothing is secured.
    trusted = _certificates() if secured else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if proxy and proxy.url.scheme == "https":
        proxy.ssl_context = trusted
    client = httpx.Client(
        headers=headers,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        proxy=proxy,
        verify=trusted,
        trust_env=False,
    )
    secrets.pop("", None)
    return Connection(bare, client, found and found[0], secrets, variable, bool(key), bool(url.userinfo))


def hidden(text: str, secrets: Mapping[str, str]) -> str:
    """Somebody else's text with every secret replaced, also those that were quoted or escaped."""
    for secret in sorted(secrets, key=len, reverse=True):
        forms = {secret, quote(secret, safe=""), html.escape(secret), json.dumps(secret)[1:-1]}
        for form in sorted({*forms, repr(secret)[1:-1]}, key=len, reverse=True):
            text = text.replace(form, secrets[secret])
    return text


def lasting(error: Exception, way: Connection, first: bool) -> ServerError | None:
    """The error to show for a failure to connect that waiting does not change; None if it may pass.

    first: the server never answered, so that its address may be wrong.
    """
    met = list(causes(error))
    tls = next((e for e in met if isinstance(e, ssl.SSLError)), None)
    if isinstance(tls, ssl.SSLCertVerificationError):
        whose = f", or that of the proxy that {way.proxy} names," if way.proxy else ""
        what = f"the server's certificate{whose} is not trusted: {tls.verify_message}"
        step = REMEDIES.get(tls.verify_code, TRUST)
    elif isinstance(error, httpx.ProxyError) and re.match(r"4(?!08|29)\d\d|501", str(error)):
        return proxy_refuses(way, str(error))
    elif first and tls and isinstance(error, httpx.ConnectError) and not isinstance(tls, ssl.SSLEOFError):
        what = f"no https connection{way.via} ({tls.reason or tls}): there seems to be a server of plain http"
        step = "write http:// instead of https:// in the server's address"
        step += f" or in {way.proxy}" if way.proxy else ""
    elif first and any(isinstance(e, socket.gaierror) and e.errno in NO_SUCH_NAME for e in met):
        whose = f"the proxy that {way.proxy} names" if way.proxy else "this server"
        what = f"the name of {whose} is not known here"
        step = f"correct {way.proxy}, or list the server in NO_PROXY" if way.proxy else "correct its address"
    elif first and isinstance(error, httpx.RemoteProtocolError | httpx.ReadError) and _takes_https(way):
        what = "this server takes https only"
        step = "write https:// instead of http:// in the server's address"
    else:
        return None
    return ServerError(what, where=way.url, next_step=step)


def proxy_refuses(way: Connection, said: str) -> ServerError:
    """The error for a proxy that does not let requests through."""
    return ServerError(
        f"the proxy that {way.proxy} names refuses ({hidden(said, way.secrets)})",
        where=way.url,
        next_step=f"correct {way.proxy} (user and password are part of it), or list the server in NO_PROXY",
    )


def _takes_https(way: Connection) -> bool:
    """Whether the server of a http:// address greets a client of https."""
    url = httpx.URL(way.url)
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE  # nothing is sent
    if url.scheme == "http" and not way.proxy:
        with suppress(OSError), socket.create_connection((url.host, url.port or 80), 2) as plain:
            anybody.wrap_socket(plain).close()
            return True
    return False


def _address(given: str) -> httpx.URL:
    """An address without a trailing /v1. Raises ServerError, which shows nothing that may be a password."""
    bare = given.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        url = httpx.URL("" if re.search(r"\s", bare) else bare)  # which `without_logins` would not see
        url.raw_host.decode().encode("idna")  # an empty or overlong part fails here, not in every request
    except (httpx.InvalidURL, UnicodeError):
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 80) < 65536:
        secret = re.search(r"[@?#]|\w:(?!//|\d+(?:/|$))", bare)
        shown = "one address (not shown: it may hold a password)" if secret else repr(bare)
        raise ServerError(
            f"{shown} is not a server's address", next_step="give one such as http://127.0.0.1:8000"
        )
    if url.query or url.fragment:
        shown = str(url.copy_with(userinfo=b"", query=None, fragment=None))
        raise ServerError(
            f"the address {shown} has a part after '?' or '#', and servers have no settings",
            next_step="give the address alone, such as http://127.0.0.1:8000",
        )
    return url


# ── proxies ───────────────────────────────────────────────────────────────────────────────────────────


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        found = ipaddress.ip_address(host)
        return getattr(found, "ipv4_mapped", None) or found
    with suppress(OSError):
        return ipaddress.ip_address(socket.inet_aton(host))  # 127.1
    return None


def _proxy_of(url: httpx.URL) -> tuple[str, str] | None:
    """(variable, proxy) for an address; None if it is reached without one."""
    host = url.raw_host.decode().rstrip(".").lower()
    ip, proxies = _ip(host), getproxies()
    if host in THIS_MACHINE or host.endswith(".localhost") or (ip and (ip.is_loopback or ip.is_unspecified)):
        return None
    kind = next((kind for kind in (url.scheme, "all") if proxies.get(kind)), None)
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    if kind is None or any(_lists(entry, host, port) for entry in re.split(r"[\s,]+", proxies.get("no", ""))):
        return None
    return _variable(kind), proxies[kind]


def _variable(kind: str) -> str:
    """The variable that names the proxy of a kind: http, https or all."""
    names = [name for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY") if os.environ.get(name)]
    return (names or [f"the system's {kind} proxy"])[0]


def _lists(entry: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY means a host: a name and all below it, an address, a network, or all (*).
    An entry with a port means that port only."""
    entry = (entry.partition("://")[2] or entry).rstrip("/").lower()
    ip = _ip(host)
    with suppress(ValueError):
        network = ipaddress.ip_network(re.sub(r"^\[(.*)](/\d+)?$", r"\1\2", entry), strict=False)
        return ip is not None and ip in network
    name, only = re.fullmatch(r"\[?(.*?)]?(?::(\d+))?", entry, re.DOTALL).groups()  # type: ignore[union-attr]
    name = name if name == "*" else name.lstrip("*.")
    named = name == "*" or (ip is not None and ip == _ip(name)) or f".{host}".endswith(f".{name}")
    return bool(name) and named and only in (None, str(port))


def _usable_proxy(variable: str, value: str) -> httpx.Proxy:
    """The proxy that a variable names. Raises ServerError if no request could go through it."""
    scheme, told, _ = value.partition("://")
    try:
        proxy = httpx.Proxy(value if told else f"http://{value}")
        if not proxy.url.host or not 0 < (proxy.url.port or 80) < 65536:
            raise ValueError
        httpx.HTTPTransport(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), proxy=proxy)
    except (ValueError, httpx.InvalidURL, ImportError) as error:
        kind = f" of {scheme}://" if told and re.fullmatch(r"[a-z][\w+-]{0,9}", scheme, re.ASCII) else ""
        install = ", or pip install 'httpx[socks]'" if isinstance(error, ImportError) else ""
        raise ServerError(
            f"{variable} names a proxy{kind} that cannot be used here",
            next_step=f"name one of http:// there, or unset {variable} for this command{install}",
        ) from None
    return proxy


# ── certificates ──────────────────────────────────────────────────────────────────────────────────────


def _certificates() -> ssl.SSLContext:
    """The certificates that are trusted. Raises ServerError with the variable that names none."""
    variable = next((v for v in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(v)), "SSLKEYLOGFILE")
    try:
        if variable == "SSL_CERT_DIR":
            os.listdir(os.environ[variable])
        return httpx.create_ssl_context()
    except (OSError, ValueError) as error:
        if getattr(error, "filename", None) == os.environ.get("SSLKEYLOGFILE", ""):
            variable = "SSLKEYLOGFILE"
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ServerError(
            f"{variable} names {os.environ.get(variable)!r}, which cannot be used: {without_logins(reason)}",
            next_step=f"correct {variable}, or unset it for this command",
        ) from None


# ── the Hub ───────────────────────────────────────────────────────────────────────────────────────────


def check_hub() -> None:
    """Raise ServerError, naming the variable, if the Hub's own client cannot be made in this environment.

    That client reads every proxy variable, also those that an address of the Hub does not need.
    """
    if constants.HF_HUB_OFFLINE:
        return
    proxies = getproxies()
    for kind in ("http", "https", "all"):
        if kind in proxies:
            _usable_proxy(_variable(kind), proxies[kind])
    _certificates()
    if not os.environ.get("HF_TOKEN", "").isascii():
        raise ServerError(
            "the environment variable HF_TOKEN holds characters that no token has",
            next_step="export HF_TOKEN=TOKEN again, in ASCII",
        )
    try:
        httpx.Client().close()
    except httpx.InvalidURL:
        raise ServerError(
            "NO_PROXY has an entry with which the Hub cannot be asked",
            next_step="write addresses there without brackets, or unset NO_PROXY for this command",
        ) from None
