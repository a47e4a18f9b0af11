"""`pack`: a model as a folder from which it starts in a moment, with its matrices in the format of decode steps."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..kernels import cpu
from ..kernels.ops import available
from ..kernels.packed import EXACT_BYTES, PackedLinear, finite
from ..kernels.store import Writer
from ..predictors import files
from ..predictors.anatomy import Anatomy, Experts, check_model, dissect, rows_of
from ..predictors.calibration import TokenText, text_of
from ..predictors.checks import AS_PACKED, PACKINGS, WEIGHT_FORMATS, check_flag, check_share, path_of
from ..predictors.errors import CoreskipError, reason_of
from ..predictors.fingerprint import Fingerprint
from ..predictors.plan import PACKED_AS, Plan
from ..predictors.rounding_recipe import RoundingRecipe
from ..predictors.sealed import seal
from .formats import format_takers
from .lower_cpu import HEAD_FORMAT, KERNEL_FORMATS
from .packed_experts import HeldExperts, can_be_held, names_of, refuse_with_text, stacks_of
from .packed_folder import CALIBRATION, DOCUMENT, FORMAT, PLAN, VERSION, WEIGHTS, file_sums, is_packed_folder
from .packed_layer import PackedLayer, PackedRows, StandIn
from .rounded_model import rows_of_parts, split
from .rounding import Rounded, compensate, round_by
from .sensitivity import recipe_within
from .weight_readers import read_elsewhere
from .wrap import make_way

AS_LOADED, BFLOAT16, INT4 = "as-loaded", "bfloat16", "int4"
_HALF = 0.5  # of a float32 matrix' bytes, at most, for another form of its very numbers


def check_weights(weights: Any, calibrated: bool = False) -> None:
    """Raises CoreskipError unless a model can be packed so. calibrated: whether there is a text for that."""
    if weights is not None and weights not in PACKINGS:
        raise CoreskipError(f"weights is {weights!r}; choose from {', '.join(PACKINGS)}")
    if calibrated and (weights or INT4) != INT4:
        raise CoreskipError(f"a text calibrates rounding to 4 bits: leave it out, or weights={weights!r}")


def check_mixed(share: Any, calibrated: bool) -> None:
    """Raises CoreskipError unless widths can be mixed so."""
    if share is not None:
        check_share("share", share)
        if not calibrated:
            raise CoreskipError("which matrices get 8 bits is measured on a text: give one, or leave out the share")


def check_target(folder: str | os.PathLike[str]) -> Path:
    """The folder to write; `CoreskipError` where a packed model must not or cannot be written there."""
    target = path_of(folder, "a packed model")
    if not target.name:
        raise CoreskipError(f"{str(target)!r} cannot name a packed model; give a folder name such as my.packed")
    if target.exists() and not target.is_dir():
        raise CoreskipError(f"{target} exists and is not a folder; choose another name")
    if target.is_dir() and any(target.iterdir()) and not is_packed_folder(target):
        raise CoreskipError(f"{target} exists and is not a packed model; choose another name")
    files.check_folder(target)
    return target


def pack(
    model: Any,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    weights: str | None = None,
    text: TokenText | str | os.PathLike[str] | None = None,
    share: float | None = None,
    progress: bool = True,
) -> Path:
    """Write `model` with its tokenizer as a packed model, which `coreskip.load` maps in a moment.

    Args:
        model: a causal LM on the CPU, not wrapped; it stays as it is.
        folder: to write; a packed model there is replaced, in one step, by the finished one.
        plan: goes with it, and is used by the commands where no other is named; a Plan or the path of one. None: dense.
            One that a search for a budget found to need rounding with a text says itself how, with what text.
        weights: of the matrices of decoder layers and LM head:

            - ``"int4"``: 4-bit groups of 32 inputs; bytes for the head;
            - ``"int8"``: bytes in such groups;
            - ``"bfloat16"``: all parameters, matrices included;
            - ``"as-loaded"``: the very numbers, in groups or halves where these hold them in fewer bytes;
            - None: the plan's, with a text ``"int4"``, else ``"as-loaded"``.
        text: calibrates 4 bits: each matrix makes up for what rounding loses (runtime/rounding.py), in minutes. A
            string, the `Path` of a UTF-8 file, or tokens. None: plain rounding, in seconds, which costs a model that
            was not made of such numbers several times as much perplexity.
        share: with a text: mixed widths. The matrices that 4 bits cost most get 5 or 8, the LM head's among them, as
            far as a token's bytes stay within this share of those in 8 bits (runtime/sensitivity.py); about 0.6 to 1.
            None: 4 bits for all, 8 for the LM head.

    Returns:
        the folder.

    Raises:
        CoreskipError: an argument that makes no sense, a model that cannot be packed, or no room; what was in the
            folder is unchanged.
    """
    check_weights(weights, text is not None)
    check_mixed(share, text is not None)
    check_flag("progress", progress)
    check_model(model)
    target = check_target(folder)
    make_way(model)
    anatomy = dissect(model)
    plan = None if plan is None else Plan.of(plan, model)
    if plan is not None:
        plan.check(model, anatomy)
    recipe = _recipe_of(plan, model, weights=weights, text=text, share=share)
    planned = plan.weights if plan is not None and plan.weights in WEIGHT_FORMATS else None
    weights = weights or planned or (AS_LOADED if text is None and recipe is None else INT4)
    source = _Source(model, anatomy, weights, None if text is None else text_of(tokenizer, text), share, recipe)
    source.check_room(target)
    try:
        with files.replaced_folder(target) as draft:
            _write(draft, source, tokenizer, plan, progress)
    except OSError as error:
        reason = "no room on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise CoreskipError(f"cannot write the packed model {target}: {reason}; what was there is unchanged") from None
    return target


def _recipe_of(plan: Plan | None, model: Any, **others: Any) -> RoundingRecipe | None:
    """How a plan has the weights rounded, where the model's are not yet.

    Raises:
        CoreskipError: something else is asked for, too.
    """
    if plan is None or plan.rounding is None or any(isinstance(m, PackedLayer) for m in model.modules()):
        return None
    for name, value in others.items():
        if value is not None:
            raise CoreskipError(f"the plan says itself how its weights are rounded: leave out {name}")
    return plan.rounding


class _Source:
    """A model that is to be packed.

    Raises:
        CoreskipError: it cannot be.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        weights: str,
        text: TokenText | None,
        share: float | None,
        recipe: RoundingRecipe | None,
    ) -> None:
        self.model, self.anatomy, self.weights = model, anatomy, weights
        self._text, self._share, self._recipe = text, share, recipe
        before = vars(model).get(PACKED_AS) if weights == AS_LOADED else None
        self.rounded = weights if weights in WEIGHT_FORMATS else before
        if text is not None or recipe is not None:
            refuse_with_text(anatomy.experts)
        if available("cpu") is not None:
            raise CoreskipError(f"a model is packed by the native kernels: {available('cpu')}")
        if getattr(transformers, type(model).__name__, None) is not type(model):
            raise CoreskipError(f"{type(model).__name__} is not a class of transformers: only these can be packed")
        if any(p.device.type != "cpu" for name, p in self._loose()):
            raise CoreskipError("only a model on the CPU can be packed: load it with device='cpu'")
        takers = format_takers(model, anatomy)
        apart = read_elsewhere(model, takers)
        takers = [module for module in takers if module not in apart]
        packed = [module for module in takers if isinstance(module, PackedLayer)]
        if packed and weights != AS_LOADED:
            raise CoreskipError("the model is packed already: pack the one that it was made from, or as-loaded")
        self.mixtures = {m.module: m for m in anatomy.experts if m is not None and can_be_held(m)}
        matrices = [module.weight.detach() for module in takers]
        matrices += [p for m in self.mixtures.values() for p in (m.parameter(m.layout.up), m.down) if not p.is_meta]
        if weights in WEIGHT_FORMATS and not all(map(finite, matrices)):
            raise CoreskipError("weights with infinities or NaNs have no form of 4 or 8 bits")
        self.names = {module: name for name, module in model.named_modules()}
        self.takers, self.rows = list(dict.fromkeys(takers)), rows_of_parts(model, anatomy)
        self.dtype = torch.bfloat16 if weights == BFLOAT16 else model.dtype

    def _loose(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that are no packed layer's."""
        named = self.model.named_parameters(remove_duplicate=False)
        return ((name, p) for name, p in named if not isinstance(p, StandIn))

    def check_room(self, target: Path) -> None:
        """Raises CoreskipError where the disk is too full for sure."""
        parent = target.absolute().parent
        while not parent.exists():
            parent = parent.parent
        share = {"int4": EXACT_BYTES["int4"], "int8": EXACT_BYTES["int8_groups"]}.get(self.weights, 0.0)
        matrices = sum(module.weight.numel() for module in self.takers)
        matrices += sum(m.parameter(m.layout.up).numel() + m.down.numel() for m in self.mixtures.values())
        wanted = share * matrices
        free = shutil.disk_usage(parent).free
        if free < wanted:
            raise CoreskipError(
                f"the packed model takes {wanted / 1e6:.0f} MB at least, and {parent} has {free / 1e6:.0f} MB left"
            )

    @property
    def calibration(self) -> dict[str, Any] | None:
        """What text calibrated the rounding; None: none did."""
        before: dict[str, Any] | None = vars(self.model).get(CALIBRATION)
        if self._recipe is not None:
            return dict(self._recipe.text)
        return before if self._text is None else dict(self._text.fingerprint())

    def matrices(self, progress: bool) -> Iterator[tuple[Any, list[PackedLinear] | None]]:
        """Every matrix in its packed form, or None where it is written as it is, in the order of `takers`."""
        if self._text is None and self._recipe is None:
            for module in tqdm(self.takers, desc="packing", unit="matrix", disable=not progress, leave=False):
                yield module, self.parts(module)
            return
        for found in self._rounded(progress):
            rows = self.rows.get(found.module, (found.packed.out_features,))
            yield found.module, split(found.packed, rows)

    def _rounded(self, progress: bool) -> Iterator[Rounded]:
        recipe = self._recipe
        if recipe is None:
            assert self._text is not None
            if self._share is None:
                return compensate(self.model, self._text, resume=True, progress=progress)
            recipe = recipe_within(self.model, self._text, self._share, progress=progress)
        return round_by(self.model, recipe, resume=True, progress=progress)

    def parts(self, module: Any) -> list[PackedLinear] | None:
        """The module's matrix in packed form; None where it is written as it is."""
        if isinstance(module, PackedLayer):
            return module.parts()
        if self.weights == BFLOAT16:
            return None
        weight, _ = rows_of(module)
        counts = self.rows.get(module, (weight.shape[0],))
        rows = weight.split(counts)
        if self.weights == AS_LOADED:
            found = [cpu.pack_exactly(part.contiguous(), most=_HALF) for part in rows]
            exact = [part for part in found if part is not None]
            return exact if len(exact) == len(rows) else None
        head = module is self.model.get_output_embeddings()
        fmt = HEAD_FORMAT if head else KERNEL_FORMATS[self.weights]
        return [PackedLinear.pack(part, fmt=fmt) for part in rows]

    def stacks(self, mixture: Experts) -> dict[str, list[PackedLinear]] | None:
        """The matrices of all experts in packed form, by their kind; None where they are written as they are."""
        if isinstance(mixture.module, HeldExperts):
            return mixture.module.stacks
        if self.weights == BFLOAT16:
            return None
        found = stacks_of(mixture, self._experts_packed)
        alike = [{(part.fmt, part.weight.dtype) for part in parts} for parts in found.values()]
        narrow = all(len(kinds) == 1 and next(iter(kinds))[1] != self.dtype for kinds in alike)
        return found if narrow else None

    def _experts_packed(self, matrices: Sequence[tuple[Tensor, Tensor | None]]) -> list[PackedLinear]:
        if self.weights == AS_LOADED:
            return [cpu.pack_exactly(w.contiguous(), most=_HALF) or PackedLinear.pack(w) for w, _ in matrices]
        return [PackedLinear.pack(weight, fmt=KERNEL_FORMATS[self.weights]) for weight, _ in matrices]

    def cast(self, tensor: Tensor) -> Tensor:
        """As it is written: as it is, but for models that are to be in bfloat16."""
        return tensor.to(torch.bfloat16) if self.weights == BFLOAT16 and tensor.is_floating_point() else tensor

    def embedding(self) -> PackedLinear | None:
        """The embeddings in packed form, where that holds their very numbers."""
        table = self.model.get_input_embeddings()
        if isinstance(table, PackedRows):
            return table.part()
        if self.weights == BFLOAT16 or not isinstance(table, nn.Embedding) or table.weight.dim() != 2:
            return None
        return cpu.pack_exactly(table.weight, most=_HALF)

    def written(
        self, packed: Iterable[nn.Module], held: Iterable[nn.Module]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What is written besides packed matrices, and those of the experts in `held`: tensors by name, and of tied
        ones the name of the first."""
        own = {(module, "weight") for module in packed} | {(module, "bias") for module in packed}
        own |= {(module, name) for module in held for name in names_of(self.mixtures[module])}
        first, tensors, tied = dict[int, str](), dict[str, Tensor](), dict[str, str]()
        for module_name, module in self.model.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None or (module, leaf) in own:
                    continue
                name = f"{module_name}.{leaf}" if module_name else leaf
                if id(parameter) in first:
                    tied[name] = first[id(parameter)]
                else:
                    first[id(parameter)] = name
                    tensors[name] = parameter
        return tensors, tied


def _write(draft: Path, source: _Source, tokenizer: Any, plan: Plan | None, progress: bool) -> None:
    model = source.model
    _save_rest(draft, source, tokenizer)
    writer = Writer(draft / WEIGHTS)
    try:
        packed = _write_packed(writer, source, progress)
        modules = {module for module in source.names if source.names[module] in packed}
        experts = _write_experts(writer, source)
        held = {module for module in source.mixtures if source.names[module] in experts}
        parameters, tied = source.written(modules, held)
        for name, tensor in parameters.items():
            writer.add(name, source.cast(tensor))
        buffers = _buffers(model)
        for name, tensor in buffers.items():
            writer.add(name, tensor)
        fingerprint = _write_fingerprint(writer, Fingerprint.of(model, source.anatomy))
        found = writer.close()
    except BaseException:
        writer.abandon()
        raise
    if plan is not None:
        # inputs are rounded where the plan or the packing rounds, and nowhere else
        replace(plan, weights=AS_PACKED if packed and source.rounded is not None else None).save(draft / PLAN)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "class": type(model).__name__,
        "transformers": transformers.__version__,
        "dtype": str(source.dtype).removeprefix("torch."),
        "weights": source.rounded,
        "calibration": source.calibration,
        "packed": packed,
        "experts": experts,
        "parameters": {name: name for name in parameters},
        "buffers": {name: name for name in buffers},
        "tied": tied,
        "tensors": writer.index,
        "bytes": found["bytes"],
        "weights_checksum": found["checksum"],
        "fingerprint": fingerprint,
        "files": file_sums(draft),
    }
    files.write_durably(draft / DOCUMENT, seal(document))


def _write_packed(writer: Writer, source: _Source, progress: bool) -> dict[str, Any]:
    """Writes the packed matrices; what `packed.json` says of each, by the module's name."""
    packed: dict[str, Any] = {}
    head, of_head = source.model.get_output_embeddings(), list[PackedLinear]()
    for module, parts in source.matrices(progress):
        if parts is None:
            continue
        of_head = parts if module is head else of_head
        name = source.names[module]
        entries = []
        for index, part in enumerate(parts):
            key = f"{name}.packed.{index}"
            writer.add(key, part.weight)
            entries.append({"tensor": key, "format": _format(part), "rows": part.out_features})
        bias = None
        if module.bias is not None:
            bias = f"{name}.bias"
            writer.add(bias, source.cast(module.bias))
        dtype = str(module.weight.dtype).removeprefix("torch.")
        packed[name] = {"inputs": parts[0].in_features, "parts": entries, "bias": bias, "dtype": dtype}
    _write_embedding(writer, source, of_head, packed)
    return packed


def _write_experts(writer: Writer, source: _Source) -> dict[str, Any]:
    """Writes packed experts, those of a layer one after the other; what `packed.json` says of each mixture."""
    found: dict[str, Any] = {}
    for module, mixture in source.mixtures.items():
        stacks, name, entries = source.stacks(mixture), source.names[module], dict[str, Any]()
        for kind, parts in {} if stacks is None else stacks.items():
            key = f"{name}.packed.{kind}"
            writer.add(key, torch.stack([part.weight for part in parts]))
            shape = {"rows": parts[0].out_features, "inputs": parts[0].in_features}
            entries[kind] = {"tensor": key, "format": _format(parts[0]), **shape}
        if entries:
            found[name] = {"layout": vars(mixture.layout), "stacks": entries}
    return found


def _format(part: PackedLinear) -> str:
    return part.fmt or str(part.weight.dtype).removeprefix("torch.")


def _write_embedding(writer: Writer, source: _Source, of_head: list[PackedLinear], packed: dict[str, Any]) -> None:
    """Writes the embeddings in packed form, too, where that holds their very numbers: the head's, if they are alike."""
    module, head = source.model.get_input_embeddings(), source.model.get_output_embeddings()
    table = source.embedding()
    if table is None:
        return
    key = f"{source.names[module]}.packed.0"
    if len(of_head) == 1 and torch.equal(of_head[0].weight, table.weight):
        key = packed[source.names[head]]["parts"][0]["tensor"]
    else:
        writer.add(key, table.weight)
    part = {"tensor": key, "format": _format(table), "rows": table.out_features}
    packed[source.names[module]] = {"inputs": table.in_features, "parts": [part], "bias": None}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that a checkpoint holds: others are computed when a model is made."""
    found = {}
    for prefix, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                found[f"{prefix}.{leaf}" if prefix else leaf] = buffer
    return found


def _write_fingerprint(writer: Writer, fingerprint: Fingerprint) -> dict[str, Any]:
    writer.add("fingerprint", fingerprint.probes)
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_sizes", "activation", "dtype", "experts")
    return {**{name: getattr(fingerprint, name) for name in names}, "probes": "fingerprint"}


def _save_rest(draft: Path, source: _Source, tokenizer: Any) -> None:
    """Configuration and tokenizer: first, for what cannot be saved shows before matrices are rounded for minutes."""
    try:
        tokenizer.save_pretrained(draft)
        _save_config(source.model, draft, source.dtype)
    except OSError:
        raise
    except Exception as error:  # transformers refuses generation settings that contradict each other
        raise CoreskipError(f"cannot save the model's settings or its tokenizer: {reason_of(error)}") from error


def _save_config(model: Any, draft: Path, dtype: torch.dtype) -> None:
    before = model.config.dtype
    try:
        model.config.dtype = dtype
        model.config.save_pretrained(draft)
    finally:
        model.config.dtype = before
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(draft)
