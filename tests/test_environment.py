"""The environment of desktops and companies: one sentence that names the variable, at once, and no secret.

Whole commands run in one process of their own, one after the other, each with its own variables.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.main import get_command

import deepspec.answers.through_servers  # noqa: F401 (loaded before the child is forked)
from deepspec.cli import app
from standin import StandIn

COMMAND = get_command(app)
SECRETS = ("hush", "sk-", "aHVzaA", "bWU6")
"""Parts of every key and password below, and of their base64 forms."""


class Case(NamedTuple):
    """A command. said: what its error says; None if it succeeds."""

    address: str
    variables: dict[str, str]
    said: str | None
    more: tuple[str, ...] = ()


class Said(NamedTuple):
    code: int
    seconds: float
    out: str
    err: str


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StandIn, Path]]:
    """A server of https for `localhost`, and its certificate, which nobody has signed."""
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with the openssl command")
    folder = tmp_path_factory.mktemp("certificate")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
    words += f"-subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout {key} -out {certificate}"
    subprocess.run(words.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with StandIn() as server:
        assert server._server is not None
        server._server.socket = context.wrap_socket(
            server._server.socket, server_side=True, do_handshake_on_connect=False
        )
        yield server, certificate


def cases(
    plain: StandIn, guarded: StandIn, proxy: StandIn, safe: StandIn, certificate: Path
) -> dict[str, Case]:
    """By name. Hosts of the domain `.invalid` exist nowhere."""
    here, away, https = plain.url, "http://gpu1.invalid:8000", f"https://localhost:{safe.port}"
    login, refuser = here.replace("//", "//me:hush@"), proxy.url.replace("//", "//me:hush@")
    dead = "http://me:hush@127.0.0.1:9"
    no_key = "environment variable OPENAI_API_KEY holds characters that no API key has"
    unusable, names = " names a proxy of {}:// that cannot be used here", "the proxy that {} names"
    addresses = "::1,[::1],fe80::/10,[fd00::]/8,fe80::1%eth0"
    return {
        # proxies; the first command loads what the others use
        "this machine": Case(here, {"HTTP_PROXY": dead, "ALL_PROXY": "socks://hush@x", "NO_PROXY": ""}, None),
        "socks of a desktop": Case(
            away, {"ALL_PROXY": "socks://me:hush@127.0.0.1:1080/"}, "ALL_PROXY" + unusable.format("socks")
        ),
        "socks4": Case(away, {"all_proxy": "socks4://x:1"}, "all_proxy" + unusable.format("socks4")),
        "ftp": Case(away, {"HTTP_PROXY": "ftp://hush@x:1"}, "HTTP_PROXY" + unusable.format("ftp")),
        "no port": Case(
            away, {"http_proxy": "http://me:hush@x:port"}, "http_proxy" + unusable.format("http")
        ),
        "too large": Case(away, {"HTTP_PROXY": "me:hush@x:99999"}, "HTTP_PROXY names a proxy that cannot"),
        "unquoted": Case(away, {"HTTP_PROXY": "http://me:hu#sh@x:1"}, "HTTP_PROXY" + unusable.format("http")),
        "unknown": Case(
            away, {"HTTP_PROXY": "http://me:hush@p.invalid:1"}, names.format("HTTP_PROXY") + " is not known"
        ),
        "wants a password": Case(away, {"HTTP_PROXY": refuser}, names.format("HTTP_PROXY") + " refuses"),
        "no tunnel": Case(
            "https://gpu1.invalid", {"HTTPS_PROXY": refuser}, names.format("HTTPS_PROXY") + " refuses"
        ),
        "no https": Case(
            "https://gpu1.invalid",
            {"https_proxy": refuser.replace("http", "https")},
            "no https connection through " + names.format("https_proxy"),
        ),
        "localhost": Case(f"http://localhost:{plain.port}", {"http_proxy": dead}, None),
        "IPv6 in no_proxy": Case(here, {"NO_PROXY": addresses, "HTTP_PROXY": dead}, None),
        # certificates
        "self-signed": Case(https, {}, "is not trusted: self-signed certificate"),
        "trusted": Case(https, {"SSL_CERT_FILE": str(certificate)}, None),
        "another name": Case(
            f"https://127.0.0.1:{safe.port}", {"SSL_CERT_FILE": str(certificate)}, "IP address mismatch"
        ),
        "no such file": Case(https, {"SSL_CERT_FILE": "/nowhere.pem"}, "SSL_CERT_FILE names '/nowhere.pem'"),
        "no certificate": Case(https, {"SSL_CERT_FILE": __file__}, "SSL_CERT_FILE names"),
        "no such folder": Case(https, {"SSL_CERT_DIR": "/nowhere"}, "SSL_CERT_DIR names '/nowhere'"),
        "no such log": Case(https, {"SSLKEYLOGFILE": "/nowhere/log"}, "SSLKEYLOGFILE names '/nowhere/log'"),
        "no such file, not needed": Case(here, {"SSL_CERT_FILE": "/nowhere.pem"}, None),
        "https on http": Case(here.replace("http", "https"), {}, "there seems to be a server of plain http"),
        "http on https": Case(https.replace("https", "http"), {}, "this server takes https only"),
        # keys
        "a key": Case(guarded.url, {"OPENAI_API_KEY": "sk-right-hush"}, None),
        "a key of another name": Case(
            guarded.url, {"MY_KEY": "sk-right-hush\n"}, None, ("--api-key-env", "MY_KEY")
        ),
        "a wrong key": Case(guarded.url, {"OPENAI_API_KEY": "sk-hush"}, "refuses the API key (HTTP 401"),
        "no key": Case(guarded.url, {}, "the server asks for an API key"),
        "white space": Case(here, {"OPENAI_API_KEY": "sk-hu hush"}, no_key),
        "a line break": Case(here, {"OPENAI_API_KEY": "sk-hu\nhush"}, no_key),
        "no letter of ASCII": Case(here, {"OPENAI_API_KEY": "sk-hush\u0435"}, no_key),
        "no letter at all": Case(here, {"OPENAI_API_KEY": "sk-hush\udcff"}, no_key),
        "the key for its name": Case(here, {}, "--api-key-env does not name", ("--api-key-env", "sk-hush")),
        "a password": Case(login, {}, None),
        "a wrong password": Case(
            guarded.url.replace("//", "//me:hush@"), {}, "refuses the user and password"
        ),
        "a password and a key": Case(login, {"OPENAI_API_KEY": "sk-hush"}, "OPENAI_API_KEY holds an API key"),
        # addresses
        "no such name": Case("http://me:hush@gpu1.invalid:1", {}, "the name of this server is not known"),
        "no such port": Case("http://me:hush@127.0.0.1:99999", {}, "is not a server's address"),
        "no host": Case("http://me:hush", {}, "is not a server's address"),
        "a query": Case("http://127.0.0.1:1?key=hush", {}, "servers have no settings"),
    }


def resolved(host: Any, *more: Any, lookup: Any = socket.getaddrinfo, **how: Any) -> Any:
    """What the system answers on a machine with a network; without one it would say: try again."""
    if str(host).endswith(".invalid"):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return lookup(host, *more, **how)


def run_case(place: Path, case: Case) -> None:
    """Run a command, and leave what it said in its folder."""
    words = ["data", "regenerate", str(place / "prompts.jsonl"), "--out", str(place / "answers.jsonl")]
    words += ["--server", case.address, *case.more]
    began, code = time.monotonic(), None
    with (place / "out").open("w") as out, (place / "err").open("w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        with redirect_stdout(out), redirect_stderr(err):
            try:
                COMMAND(words, prog_name="deepspec")
            except SystemExit as ended:
                code = ended.code
            except BaseException:
                traceback.print_exc()
    (place / "code").write_text(f"{code or 0} {time.monotonic() - began}")


def ran(folder: Path, wanted: dict[str, Case]) -> dict[str, Said]:
    """Every command, in one process; its prompts and answers are in a folder of their own."""
    places = {name: folder / re.sub(r"\W", "_", name) for name in wanted}
    for place in places.values():
        place.mkdir()
        (place / "prompts.jsonl").write_text('{"id": "a", "prompt": "hi"}\n{"id": "b", "prompt": "ho"}\n')
    # A forked child has torch already; the clean environment and the stand-in resolver end with it.
    if (child := os.fork()) == 0:
        try:
            signal.alarm(60)
            socket.getaddrinfo = resolved
            clean = {k: v for k, v in os.environ.items() if not re.search("(?i)_proxy$|SSL|OPENAI", k)}
            for name, case in wanted.items():
                os.environ.clear()
                os.environ.update(clean | case.variables)
                run_case(places[name], case)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    said = {}
    for name, place in places.items():
        code, seconds = (place / "code").read_text().split()
        said[name] = Said(int(code), float(seconds), (place / "out").read_text(), (place / "err").read_text())
    return said


def test_every_environment_gives_one_sentence_at_once_and_no_secret(tmp_path, secured):
    refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    with StandIn() as plain, StandIn(key="sk-right-hush") as guarded, StandIn() as proxy:
        proxy.raw = lambda path, body: [refusal]
        wanted = cases(plain, guarded, proxy, *secured)
        said = ran(tmp_path, wanted)
    for name, case in wanted.items():
        code, seconds, out, err = said[name]
        assert "Traceback" not in err, f"{name}: {err}"
        if case.said is None:
            assert code == 0, f"{name}: {err}"
            assert "2 new answers" in out, name
        else:
            assert code == 2, f"{name}: {err}"
            assert case.said in err, f"{name}: {err}"
            assert "  next: " in err, name
            assert err.count("\n") <= 3, f"{name}: {err}"
            assert seconds < 5, name  # the shortest wait for a server that may come up is 30 s
            assert not out, name
        for secret in SECRETS:
            assert secret not in out + err, name
    for file in tmp_path.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert not any(secret.encode() in content for secret in SECRETS), file
