"""What `memory=` says: so many bytes, or a share of what is free here. Without torch, for the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..predictors.errors import CoreskipError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_EXAMPLES = 'give bytes, "4GB", "512MiB" or "60%"'
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*(%|([KMGT]?)(I?)B?)", re.IGNORECASE)
_NO_LIMIT = 1 << 60  # version 1 of control groups has a number there


def share_of(text: str) -> float | None:
    """A cap that is a share, in (0, 1]; None of one that is not."""
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 < share <= 1 else None


def bytes_of(memory: Any) -> int:
    """Bytes that `memory` stands for: a number of them, "4GB" (10**9), "4GiB" (2**30), or "60%" of what is free.

    Raises:
        CoreskipError: it stands for none.
    """
    if isinstance(memory, (int, float)) and not isinstance(memory, bool):
        size = float(memory)
    else:
        found = _SIZE.fullmatch(memory.strip()) if isinstance(memory, str) else None
        if found is None:
            raise CoreskipError(f"memory is {memory!r}; {_EXAMPLES}")
        number, unit, prefix, binary = found.groups()
        if unit == "%":
            if not 0 < float(number) <= 100:
                raise CoreskipError(f"memory is {memory!r}; a share is above 0% and at most 100%")
            size = float(number) / 100 * free_memory()
        else:
            size = float(number) * (1024 if binary else 1000) ** _POWERS[prefix.upper()]
    if not 1 <= size < 2**63:
        raise CoreskipError(f"memory is {memory!r}; {_EXAMPLES}")
    return int(size)


def text_of(size: float) -> str:
    """Bytes for people, rounded up: who is told that so many are needed can give as many."""
    if size >= 1e9:
        return f"{math.ceil(size / 1e7) / 100:.2f} GB"
    return f"{math.ceil(size / 1e5) / 10:.1f} MB"


def free_memory(root: str | Path = "/") -> int:
    """Bytes that this process may take: what the machine has available, or its control groups leave it."""
    import psutil

    rooms = [int(psutil.virtual_memory().available)]
    try:
        lines = (Path(root) / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        rooms += _rooms(Path(root) / "sys/fs/cgroup", line)
    return max(0, min(rooms))


def _rooms(mount: Path, line: str) -> Iterator[int]:
    """What a line of /proc/self/cgroup leaves, "hierarchy:controllers:path", from the group up to its root. What the
    page cache holds of a group goes where memory is needed: it counts as free."""
    _, controllers, path = line.split(":", 2)
    if controllers and "memory" not in controllers.split(","):
        return
    top = mount / "memory" if controllers else mount
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
    group = top / path.strip("/")
    for folder in (group, *group.parents):
        try:
            limit, used = ((folder / name).read_text().strip() for name in names)
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
            if limit != "max" and int(limit) < _NO_LIMIT:
                yield int(limit) - int(used) + (int(cached[1]) if cached else 0)
        except (OSError, ValueError):
            pass
        if folder == top:
            return
