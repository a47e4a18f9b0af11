"""The folder that a Plan is kept in: ``plan.json``, sealed by checksums, and ``plan.safetensors``.

``plan.json`` holds the recipe, the fingerprints, each layer's policy and the measured quality; ``plan.safetensors`` the
indices, centroids, means and predictor weights. What is damaged, edited, truncated or of a newer format raises
`PlanError` before any model is touched. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from . import files
from .checks import path_of
from .errors import CoreskipError, PlanError
from .sealed import seal, unseal

_FORMAT, FORMAT_VERSION = "coreskip.plan", 2  # the newest that is read: 2 has interventions
_JSON, _TENSORS = "plan.json", "plan.safetensors"
OF_PACKED = "plan"  # where a packed model has its plan

_T = TypeVar("_T")


def write(path: str | os.PathLike[str], document: dict[str, Any], tensors: dict[str, Tensor], version: int) -> None:
    """Write the folder `path`. Atomic: an older Plan there survives any failure whole. version: the oldest that says it
    all, so that older readers take what they understand.

    Raises:
        CoreskipError: `path` is something other than a Plan, or cannot be written (no room, no permission).
    """
    target = path_of(path, "a plan")
    check_target(target)
    # layers may share a tensor, which safetensors refuses
    data = safetensors.torch.save({name: t.cpu().contiguous().clone() for name, t in tensors.items()})
    checksum = hashlib.sha256(data).hexdigest()
    sealed = seal({"format": _FORMAT, "version": version, **document, "tensors_sha256": checksum})
    try:
        with files.replaced_folder(target) as draft:
            files.write_durably(draft / _TENSORS, data)
            files.write_durably(draft / _JSON, sealed)
    except OSError as error:
        raise CoreskipError(
            f"cannot write the plan {target}: {error.strerror or error}; what was there is unchanged"
        ) from None


def read(path: str | os.PathLike[str], decode: Callable[[dict[str, Any], dict[str, Tensor]], _T]) -> _T:
    """What `decode` makes of the document and the tensors in the folder `path`, or in a packed model's.

    Raises:
        PlanError: not a Plan, of a newer format, truncated, edited or inconsistent.
    """
    folder = path_of(path, "a plan")
    if not (folder / _JSON).exists() and (folder / OF_PACKED / _JSON).exists():
        folder = folder / OF_PACKED
    try:
        text, data = files.read_together(folder, (_JSON, _TENSORS))
    except OSError as error:
        if not folder.is_dir():
            raise PlanError(f"there is no plan at {folder}: make one with `coreskip analyze -o {folder}`") from None
        raise PlanError(f"{folder} is not a plan: {Path(str(error.filename)).name}: {error.strerror}") from None
    document = unseal(
        text, folder / _JSON, kind=_FORMAT, version=FORMAT_VERSION, foreign="a coreskip plan",
        again="make the plan again", error=PlanError,
    )  # fmt: skip
    if hashlib.sha256(data).hexdigest() != document.get("tensors_sha256"):
        raise PlanError(f"{folder / _TENSORS} is truncated or was edited: make the plan again")
    try:
        return decode(document, safetensors.torch.load(data))
    except PlanError:
        raise
    # whatever a sealed but senseless document trips over (a missing key, a number where a list belongs) means one
    # thing to the user
    except (safetensors.SafetensorError, CoreskipError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"{folder} is not a well-formed plan ({error}): make the plan again") from None


def check_target(target: Path) -> None:
    """Raise `CoreskipError` where a Plan must not or cannot be written: over a file, into a folder with other things in
    it, or without permission. Of a link, the folder behind it is meant."""
    if not target.name:
        raise CoreskipError(f"{str(target)!r} cannot name a plan; give a folder name such as my.plan")
    try:
        if target.exists() and not target.is_dir():
            raise CoreskipError(f"{target} exists and is not a plan folder; choose another name")
        if target.is_dir() and {entry.name for entry in target.iterdir()} - {_JSON, _TENSORS}:
            raise CoreskipError(f"{target} exists and holds other files than a plan's; choose another name")
    except OSError as error:
        raise CoreskipError(f"cannot write the plan {target}: {error.strerror}") from None
    files.check_folder(target)
