"""How tables are filled from rows of less memory than the weights (memory.py, memory_soak.py), by kind of row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Columns = dict[str, Callable[[dict[str, Any]], str]]


def _unless_killed(fill: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row.get("killed") else fill(row)


def _megabytes(row: dict[str, Any]) -> str:
    read = row["bytes_read_per_token"] / 1e6
    return f"{read:.0f}" if read >= 10 else f"{read:.2f}"


def _of_disk(row: dict[str, Any]) -> str:
    """The share of the disk's bandwidth, measured in the same run, at which a way reads; nothing where it hardly
    does."""
    share = row["bytes_read_per_token"] * row["tokens_per_second"] / row["disk_bandwidth"]
    return f"{share:.2f}" if share >= 0.01 else ""


def _of_limit(row: dict[str, Any]) -> str:
    peak, limit = row.get("peak_bytes"), row.get("limit_bytes")
    return f"{peak / limit:.3f}" if peak and limit else ""


def _text(row: dict[str, Any]) -> str:
    of_dense = f", perplexity {100 * row['ppl_increase']:+.2f} %" if "ppl_increase" in row else ""
    return ("the same" if row["same_text"] else "another") + of_dense


def _cap(row: dict[str, Any]) -> str:
    return f"{row['cap'] / row['weight_bytes']:.2f} of the weights" if "cap" in row else ""


def _by_tokens(text: int) -> Callable[[dict[str, Any]], str]:
    """Memory after some tokens of a long text, the first or the last one."""

    def fill(row: dict[str, Any]) -> str:
        seen = row["memory_mb_by_tokens"][text]
        return ", ".join(f"{at}: {mb:.0f}" for at, mb in seen.items() if int(at) in (100, 500, 900))

    return _unless_killed(fill)


#: by kind, heading -> how a row fills it
MEMORY: dict[str, Columns] = {
    "capped": {
        "way": lambda row: str(row["way"]),
        "cap": _cap,
        "tok/s": lambda row: "killed" if row.get("killed") else f"{row['tokens_per_second']:.2f}",
        "MB read per token": _unless_killed(_megabytes),
        "of the disk": _unless_killed(_of_disk),
        "chosen, and there": lambda row: f"{100 * row['hits']:.1f} %" if "hits" in row else "",
        "waits for it, ms per token": lambda row: f"{1e3 * row['waits']:.2f}" if "waits" in row else "",
        "peak, of the limit": _of_limit,
        "text": _unless_killed(_text),
    },
    "soak_capped": {
        "cap": _cap,
        "minutes": lambda row: f"{row['minutes']:g}",
        "texts": lambda row: "killed" if row.get("killed") else str(row["texts"]),
        "tokens": _unless_killed(lambda row: str(row["tokens"])),
        "errors": _unless_killed(lambda row: str(row["errors"])),
        "differing": _unless_killed(lambda row: str(row["differing"])),
        "own MB by tokens of the first long text": _by_tokens(0),
        "of the last": _by_tokens(-1),
        "peak, of the limit": _of_limit,
    },
}
