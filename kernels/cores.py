"""How many cores a container lets this process use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path


def quota(root: str | Path = "/") -> int | None:
    """The CPU quota of this process's control groups in whole cores, rounded up; None where there is none.

    A group's processes that use more stand still for the rest of a period, 100 ms long as a rule. Affinity masks say
    nothing of it, nor does `torch.get_num_threads()`. The smallest quota of a group and its parents counts. `root` is
    where /proc and /sys/fs/cgroup are looked for.
    """
    try:
        lines = (Path(root) / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = [found for line in lines for found in _quotas(Path(root) / "sys/fs/cgroup", line)]
    return max(1, math.ceil(min(quotas))) if quotas else None


def _quotas(mount: Path, line: str) -> Iterator[float]:
    """The quotas of a line of /proc/self/cgroup, "hierarchy:controllers:path", from the group up to its root."""
    _, controllers, path = line.split(":", 2)
    if controllers and "cpu" not in controllers.split(","):
        return
    top = mount / "cpu" if controllers else mount
    group = top / path.strip("/")
    # inside a container the path may be the host's, and only the root be there: it is the container's group
    for folder in (group, *group.parents):
        try:
            if controllers:
                allowed = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            else:
                allowed, period = (folder / "cpu.max").read_text().split()
            if allowed.strip() not in ("max", "-1"):
                yield int(allowed) / int(period)
        except (OSError, ValueError):
            pass
        if folder == top:
            return
