"""Where rows come from: machine, versions, commit, time and command. Rows without that are not kept."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from coreskip.predictors.files import write_text
from coreskip.predictors.version import VERSION


def provenance(command: str) -> dict[str, Any]:
    """Where a row comes from: versions, machine, commit, time, and the command that makes it again."""
    return {
        "versions": {
            "coreskip": VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def model_name(model: str | None) -> str:
    """What rows call the model; of a path only the last part, which means the same on every machine."""
    if model is None:
        return "embedded"
    return Path(model).name if Path(model).exists() else model


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(torch.device(device)))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The short hash of the source's commit, with ``+`` where files differ from it; None outside of a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return None
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
