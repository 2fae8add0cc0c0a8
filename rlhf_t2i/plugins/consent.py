"""Consent by name: which hosts may get prompts and images, and which environment variables may be sent as tokens.

A recipe alone gives no consent: it may come from a stranger. Consent comes from the command line
(``rlhf-t2i --allow-host HOST --allow-token VARIABLE ...``) or from the user's own file
``~/.config/rlhf-t2i/consent.yaml``::

    hosts: [scorer.example.com, "http://10.0.0.7:8000"]
    tokens: [SCORER_TOKEN]
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe import mistakes, reading
from rlhf_t2i.utils import files

VARIABLES = {"hosts": "RLHF_T2I_ALLOW_HOSTS", "tokens": "RLHF_T2I_ALLOW_TOKENS"}
"""Environment variables that carry the command line's consent to processes it starts: names separated by spaces."""


def allow(hosts: Iterable[str] = (), tokens: Iterable[str] = ()) -> None:
    """Give consent for this process and those it starts."""
    for kind, names in (("hosts", hosts), ("tokens", tokens)):
        merged = dict.fromkeys([*os.environ.get(VARIABLES[kind], "").split(), *names])
        if merged:
            os.environ[VARIABLES[kind]] = " ".join(merged)


def check_host(url: str, who: str) -> None:
    """Refuse a URL whose host has no consent; loopback needs none.

    Args:
        url: Where prompts and images would be sent.
        who: Begins the error message: ``reward 'http'``.

    Raises:
        UsageError: A host without consent, plain http to another machine, or a password in the URL.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.username or parts.password:
        raise UsageError(f"{who}: the url holds a user name or password: put a token into token_env instead")
    if _is_loopback(host):
        return
    allowed = _allowed("hosts")
    if _origin(parts) in allowed or f"http://{host}" in allowed:
        return
    if host not in allowed and parts.netloc not in allowed:
        raise UsageError(
            f"{who} would send prompts and images to {mistakes.shown(parts.netloc)}: to allow it, run "
            f"`rlhf-t2i --allow-host {mistakes.shown(host)} ...` or list the host in {_file()}"
        )
    if parts.scheme != "https":
        raise UsageError(
            f"{who} would send prompts and images to {mistakes.shown(host)} unencrypted: use https, or allow it with "
            f"`rlhf-t2i --allow-host http://{mistakes.shown(parts.netloc)} ...`"
        )


def check_token(variable: str, who: str) -> None:
    """Refuse to send an environment variable that has no consent.

    Raises:
        UsageError: Names the variable and how to allow it.
    """
    if variable not in _allowed("tokens"):
        name = mistakes.shown(variable)
        raise UsageError(
            f"{who} would send the environment variable {name} as a token: to allow it, run "
            f"`rlhf-t2i --allow-token {name} ...` or list it in {_file()}"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _origin(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc}"


def _file() -> Path:
    return files.expanded(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "rlhf-t2i" / "consent.yaml"


def _allowed(kind: str) -> set[str]:
    """Names of a kind that the command line and the user's file allow."""
    given = os.environ.get(VARIABLES[kind], "").split()
    path = _file()
    if not path.is_file():
        return set(given)
    data, _ = reading.read(path, "consent file")
    listed = data.get(kind) or []
    unknown = next((key for key in data if key not in VARIABLES), None)
    if unknown is not None:
        raise UsageError(f"{path}: unknown key {unknown!r}; {mistakes.hint(str(unknown), VARIABLES)}")
    names = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise UsageError(f"{path}: {kind} must be a list of names")
    return {*given, *names}
