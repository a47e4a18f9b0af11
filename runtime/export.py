"""`export`: what remains of a model under a plan, in the formats of tools that know nothing of plans."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ..predictors import files
from ..predictors.anatomy import Anatomy, check_model, dissect
from ..predictors.calibration import check_tokenizer
from ..predictors.checks import check_flag, path_of
from ..predictors.errors import CoreskipError, reason_of
from ..predictors.plan import Plan
from .export_card import CARD, card, name_of
from .export_formats import check_format
from .export_weights import Pad, Smaller, prove, remaining, smaller
from .packed_folder import rounding_of
from .program import Program
from .wrap import make_way

logger = logging.getLogger("coreskip")

#: where each format is written; loaded on first use, for the packages that some need
_WRITERS = {
    "hf": ("export_hf", "Checkpoint"),
    "onnx": ("export_onnx", "OnnxFolder"),
    "gguf": ("export_gguf", "GgufFolder"),
}


class Writer(Protocol):
    """A smaller model as one format has it; making one raises `CoreskipError` where the format has no place for it.

    Attributes:
        CHOOSES: whether it has a place for neurons that each prompt chooses.
        PAD: how MLPs are padded whose layers keep different numbers of neurons.
        weights: the form of the weights.
        usage: how the folder is loaded, for people.
        notes: what the format could not take over, a line each.
        nbytes: about what is written.
    """

    CHOOSES: bool
    PAD: Pad
    weights: str
    usage: str
    notes: tuple[str, ...]

    def __init__(self, found: Smaller, tokenizer: Any, weights: str | None) -> None: ...

    @property
    def nbytes(self) -> float: ...

    def write(self, folder: Path, progress: bool) -> None:
        """Fills an empty folder."""


def export(
    model: Any,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    to: str = "hf",
    weights: str | None = None,
    progress: bool = True,
    command: str | None = None,
) -> Path:
    """Write what remains of `model` under `plan` for other tools: kept neurons alone, skipped layers gone.

    The result is sparse in prefill, too, unlike the plan under coreskip. Before anything is written, what remains is
    compared with the wrapped model on a few tokens.

    Args:
        model: a causal LM on the CPU, not wrapped; it stays as it is.
        folder: to write; it must not exist.
        plan: a Plan or the path of one that fixes everything beforehand: static neurons, kept experts, skipped layers
            and halves; to ONNX also core neurons by GRIFFIN's score, which a prompt chooses. None: the dense model.
        to: ``"hf"``: a checkpoint for ``AutoModelForCausalLM``; ``"onnx"``: for onnxruntime-genai; ``"gguf"``: for
            llama.cpp.
        weights: their form. hf: float32, bfloat16 or float16, by default the model's own; onnx: float32 (default),
            float16, or int4, blocks of 32 of 4 bits, the LM head of 8; gguf: float32, float16 (default), q8_0, q4_0 or
            q4_1.
            A plan's own `weights` are of coreskip's steps, and are not asked.
        command: that does this, for the model card.

    Returns:
        the folder.

    Raises:
        CoreskipError: a plan that chooses at run time, an architecture that the format does not know, a folder that
            exists, or no room; nothing was written.
    """
    check_format(to, weights)
    check_flag("progress", progress)
    check_model(model)
    check_tokenizer(tokenizer)
    target = check_target(folder)
    make_way(model)
    if any(p.device.type not in ("cpu", "meta") for p in model.parameters()):
        raise CoreskipError("only a model on the CPU can be exported: load it with device='cpu'")
    anatomy = dissect(model)
    plan = Plan.of(plan, model)
    plan.check(model, anatomy)
    if plan.intervenes:
        raise CoreskipError(
            "the plan changes activations, or ends some texts at once, which no checkpoint can say: it would have the "
            "skill that is switched off; plans of switch_off with method static or experts travel"
        )
    writer, found = _prepared(model, tokenizer, anatomy, plan, to, weights)
    notes = [*found.notes, *writer.notes]
    for note in notes:
        logger.warning("%s", note)
    _check_room(target, writer.nbytes)
    command = command or f'coreskip.export(model, tokenizer, "FOLDER", to="{to}")'
    text = card(
        plan,
        found,
        name=name_of(model),
        rounding=rounding_of(model),
        to=to,
        weights=writer.weights,
        usage=writer.usage,
        notes=notes,
        command=command,
    )
    try:
        with files.replaced_folder(target) as draft:
            _write(writer, draft, progress)
            files.write_text(draft / CARD, text)
            for path in draft.iterdir():  # safetensors writes files that nobody else may read
                shutil.copymode(draft / CARD, path)
    except OSError as error:
        reason = "no room on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise CoreskipError(f"cannot write {target}: {reason}; nothing of it is left") from None
    return target


def check_target(folder: str | os.PathLike[str]) -> Path:
    """The folder to write; `CoreskipError` where there is something, or nothing can be written there."""
    target = path_of(folder, "the folder to export to")
    if not target.name:
        raise CoreskipError(f"{str(target)!r} cannot name a folder to export to; give a name such as my-model")
    if target.exists() or target.is_symlink():
        raise CoreskipError(f"{target} exists: name a folder that does not")
    files.check_folder(target)
    return target


def _prepared(
    model: Any, tokenizer: Any, anatomy: Anatomy, plan: Plan, to: str, weights: str | None
) -> tuple[Writer, Smaller]:
    home, name = _WRITERS[to]
    kind: type[Writer] = getattr(import_module(f".{home}", __package__), name)
    found = smaller(model, anatomy, remaining(Program.of(anatomy, plan), kind.CHOOSES), kind.PAD)
    writer = kind(found, tokenizer, weights)
    prove(model, anatomy, plan, found)
    return writer, found


def _check_room(target: Path, wanted: float) -> None:
    """Raises CoreskipError where the disk is too full for sure."""
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < wanted:
        raise CoreskipError(f"it takes {wanted / 1e6:.0f} MB, and {parent} has {free / 1e6:.0f} MB left")


def _write(writer: Writer, draft: Path, progress: bool) -> None:
    try:
        writer.write(draft, progress)
    except (OSError, CoreskipError):
        raise
    except Exception as error:  # transformers refuses generation settings that contradict each other
        raise CoreskipError(f"cannot write the model: {reason_of(error)}; nothing of it is left") from error
