"""JSON documents that are sealed by a checksum, so that nobody edits them unnoticed: a Plan's, a packed model's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CoreskipError


def seal(document: Mapping[str, Any]) -> bytes:
    """The document as JSON with the checksum by which `unseal` knows that nobody edited it."""
    body = {key: value for key, value in document.items() if key != "checksum"}
    body["checksum"] = hashlib.sha256(_canonical(body)).hexdigest()
    return (json.dumps(body, indent=1, allow_nan=False) + "\n").encode()


def unseal(
    text: bytes,
    path: Path,
    *,
    kind: str,
    version: int,
    foreign: str,
    again: str,
    error: type[CoreskipError] = CoreskipError,
) -> dict[str, Any]:
    """The document in `text`, which was read from `path`.

    Args:
        kind: its ``format``. version: the newest ``version`` that can be read.
        foreign: what it is where its format is another. again: what to do about a damaged one.

    Raises:
        error: it is truncated, edited, newer, or of another kind.
    """
    try:
        document = json.loads(text, parse_constant=_no_constants)
    except (ValueError, RecursionError):
        raise error(f"{path} is truncated or is not JSON: {again}") from None
    if not isinstance(document, dict) or document.get("format") != kind:
        raise error(f"{path} is not {foreign}")
    found = document.get("version")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise error(f"{path} has no valid format version: {again}")
    if found > version:
        raise error(f"{path} has format version {found}, newer than {version}: upgrade coreskip")
    body = {key: value for key, value in document.items() if key != "checksum"}
    try:
        expected = hashlib.sha256(_canonical(body)).hexdigest()
    except (ValueError, RecursionError):
        expected = None
    if document.get("checksum") != expected:
        raise error(f"{path} was edited or damaged: {again}")
    return document


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _no_constants(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
