"""Decode arithmetic: what each operation promises, and which backend carries it out.

The definitions in plain torch are in reference.py. The fast backends are registered as `coreskip::mlp`,
`coreskip::choose` and `coreskip::linear` with torch's dispatcher, which picks one by device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from .packed import DTYPES, Act, PackedColumns, PackedLinear, PackedMLP

__all__ = [
    "BACKENDS",
    "MAX_ROWS",
    "PackedColumns",
    "PackedLinear",
    "PackedMLP",
    "available",
    "column_linear",
    "gate_mlp",
    "gate_select",
    "linear",
    "mlp",
    "sketch_mlp",
    "sketch_select",
]

BACKENDS = ("auto", "torch", "cpu", "triton")
MAX_ROWS = cpu.MAX_ROWS

log = logging.getLogger("coreskip")


def mlp(x: Tensor, packed: PackedMLP, indices: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """The MLP of `packed` over all neurons, or over those in `indices` alone.

    x: [..., hidden_size] of float32, bfloat16 or float16; the result has its shape and dtype.
    indices: integers, [k] for all rows alike or [R, k] with one list per row of x.reshape(R, hidden_size);
    distinct within a list, in any order; -1 stands for no neuron, so that lists can be padded.
    backend: "auto" takes the fast kernel of x's device for up to 8 rows and torch otherwise; "torch", "cpu"
    and "triton" take that one or raise.
    Raises ValueError where shapes or devices do not fit or where a named backend cannot do this call,
    RuntimeError where it is not installed, IndexError for an index out of range.
    """
    rows = _check_input(x, packed.hidden_size, packed.weight)
    if indices is not None:
        _check_indices(indices, rows, x.device)
    if _takes_torch(backend, x, rows, packed.act):
        return reference.mlp(x, packed, indices)
    return _run_mlp(x, packed, indices, "listed", -1, 0.0, 0.0, backend)


def sketch_mlp(
    x: Tensor,
    packed: PackedMLP,
    *,
    keep: int | None = None,
    threshold: float | None = None,
    refine: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """The MLP of an "int8_sliced" `packed` over the neurons that `sketch_select` would choose, row by row.

    The high plane is read once: what the choice has summed is completed with the low plane to the exact integer.
    refine: of the chosen neurons those are dropped, their down rows unread, whose exact |h| * |down row| turns out
    below this; h is act(gate) * up, less the neuron's mean where `packed` has means.
    Other arguments and errors: as for `sketch_select` and `mlp`.
    """
    return _mlp_by("sketch", x, packed, keep, threshold, backend, refine)


def sketch_select(
    x: Tensor, packed: PackedMLP, *, keep: int | None = None, threshold: float | None = None, backend: str = "auto"
) -> Tensor:
    """Chooses neurons by |act(gate) * up| * |down row|, estimated from the high 4 bits of an "int8_sliced" `packed`.

    x: [..., hidden_size], R rows. Give either `keep`, the number of neurons per row, or `threshold`, the least score.
    Returns int64 [R, keep], or [R, intermediate_size] filled up with -1; each row ascending.
    Raises ValueError for another format or where not exactly one of the two is given; else as `mlp`.
    """
    return _choose("sketch", x, packed, keep, threshold, backend)


def gate_mlp(
    x: Tensor, packed: PackedMLP, *, keep: int | None = None, threshold: float | None = None, backend: str = "auto"
) -> Tensor:
    """The MLP of a gated `packed` over the neurons that `gate_select` would choose; up and down of others stay unread.

    Arguments and errors: as for `gate_select` and `mlp`.
    """
    return _mlp_by("gate", x, packed, keep, threshold, backend)


def gate_select(
    x: Tensor, packed: PackedMLP, *, keep: int | None = None, threshold: float | None = None, backend: str = "auto"
) -> Tensor:
    """Chooses neurons by |act(gate)|, the rule of CATS, for a gated `packed` that is not sliced.

    Arguments, result and errors: as for `sketch_select`.
    """
    return _choose("gate", x, packed, keep, threshold, backend)


def linear(x: Tensor, packed: PackedLinear, *, backend: str = "auto") -> Tensor:
    """x @ weight.t() + bias.

    x: [..., in_features] of float32, bfloat16 or float16; the result is [..., out_features] of the same dtype.
    backend and errors: as for `mlp`; on a GPU this is torch's own product under any name.
    """
    rows = _check_input(x, packed.in_features, packed.weight)
    if _takes_torch(backend, x, rows, "silu") or backend == "triton":
        return reference.linear(x, packed)
    if _is_plain(x):
        return cpu.linear(x, packed)
    result: Tensor = torch.ops.coreskip.linear.default(x, *_linear_fields(packed))
    return result


def column_linear(
    x: Tensor,
    packed: PackedColumns,
    *,
    keep: int | None = None,
    threshold: float | None = None,
    by_norm: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x @ weight.t() + bias without the small inputs, whose columns stay unread; the rule of TEAL, and of WINA.

    x: [..., in_features] of float32, bfloat16 or float16; the result is [..., out_features] of the same dtype.
    An input counts by |x| or, `by_norm`, by |x| * |column|. Give either `keep`, the number of inputs per row, or
    `threshold`, the least that counts. backend and errors: as for `mlp`; on a GPU this is the torch definition.
    """
    rows = _check_input(x, packed.in_features, packed.weight)
    count, least = _check_amount(packed.in_features, keep, threshold)
    if _takes_torch(backend, x, rows, "silu") or backend == "triton":
        return reference.columns(x, packed, by_norm, count, least)
    if _is_plain(x):
        return cpu.columns(x, packed, by_norm, count, least)
    fields = (packed.weight, packed.out_features, packed.norm, packed.bias)
    result: Tensor = torch.ops.coreskip.columns.default(x, *fields, by_norm, count, least)
    return result


def available(backend: str) -> str | None:
    """None where a backend can be used, else the reason why not."""
    if backend not in BACKENDS:
        return f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}"
    try:
        if backend == "cpu":
            cpu.library()
        elif backend == "triton" and not (torch.cuda.is_available() or _gpu().INTERPRETED):
            return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    except (cpu.Unavailable, ImportError) as error:
        return str(error)
    return None


@cache
def _gpu() -> Any:
    """kernels/gpu.py, imported at its first use: Triton is an extra, and takes a second to load."""
    return import_module(".gpu", __package__)


def _run_mlp(
    x: Tensor,
    packed: PackedMLP,
    indices: Tensor | None,
    rule: str,
    keep: int,
    threshold: float,
    refine: float,
    backend: str,
) -> Tensor:
    if _is_interpreted(backend, x):
        interpreted: Tensor = _gpu().mlp(x, packed, indices, rule, keep, threshold, refine)
        return interpreted
    if _is_plain(x):
        return cpu.mlp(x, packed, indices, rule, keep, threshold, refine)
    result: Tensor = torch.ops.coreskip.mlp.default(x, *_fields(packed), indices, rule, keep, threshold, refine)
    return result


def _is_interpreted(backend: str, x: Tensor) -> bool:
    """Whether Triton has been asked for on tensors that the dispatcher would send to the CPU kernels."""
    return backend == "triton" and x.device.type == "cpu"


def _is_plain(x: Tensor) -> bool:
    """Whether nothing but the CPU kernels could want to see this call.

    Then it need not pass through the dispatcher, which takes 8 us a call for the many fields of a packed layer: a
    tenth of a 576 x 1536 layer at half its neurons.
    """
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling() and _usable("cpu")


# ---- the choice of neurons ----


def _mlp_by(
    rule: str,
    x: Tensor,
    packed: PackedMLP,
    keep: int | None,
    threshold: float | None,
    backend: str,
    refine: float = 0.0,
) -> Tensor:
    rows = _check_input(x, packed.hidden_size, packed.weight)
    count, least = _check_rule(rule, packed, keep, threshold)
    if not refine >= 0:
        raise ValueError(f"refine must be at least 0, not {refine}")
    if _takes_torch(backend, x, rows, packed.act):
        return reference.mlp_by(x, packed, rule, count, least, refine)
    return _run_mlp(x, packed, None, rule, count, least, refine, backend)


def _choose(rule: str, x: Tensor, packed: PackedMLP, keep: int | None, threshold: float | None, backend: str) -> Tensor:
    rows = _check_input(x, packed.hidden_size, packed.weight)
    count, least = _check_rule(rule, packed, keep, threshold)
    if _takes_torch(backend, x, rows, packed.act):
        return reference.choose(x, packed, rule, count, least)
    if _is_interpreted(backend, x):
        interpreted: Tensor = _gpu().choose(x, packed, rule, count, least)
        return interpreted
    result: Tensor = torch.ops.coreskip.choose.default(x, *_fields(packed), rule, count, least)
    return result


def _check_rule(rule: str, packed: PackedMLP, keep: int | None, threshold: float | None) -> tuple[int, float]:
    if rule == "sketch" and packed.fmt != "int8_sliced":
        raise ValueError('a sketch needs weights packed with fmt="int8_sliced"')
    if rule == "gate" and (not packed.gated or packed.fmt == "int8_sliced"):
        raise ValueError("choosing by gate needs a gated MLP that is not sliced")
    return _check_amount(packed.intermediate_size, keep, threshold)


def _check_amount(all_of_them: int, keep: int | None, threshold: float | None) -> tuple[int, float]:
    """Both as the ops take them: keep is -1 where the threshold counts."""
    if keep is not None and threshold is None:
        if not 0 <= keep <= all_of_them:
            raise ValueError(f"keep must be in [0, {all_of_them}], not {keep}")
        return keep, 0.0
    if keep is None and threshold is not None:
        return -1, threshold
    raise ValueError("give either keep or threshold")


# ---- the choice of a backend ----


def _takes_torch(backend: str, x: Tensor, rows: int, act: Act) -> bool:
    """Whether a call takes the torch definition. Only one under "auto" may end up elsewhere than asked for."""
    if backend == "torch":
        return True
    if backend == "auto":
        return _refusal(x, rows, act) is not None
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    reason = available(backend)
    if reason:
        raise RuntimeError(f"backend {backend!r}: {reason}")
    reason = _refusal(x, rows, act) or _misplaced(backend, x)
    if reason:
        raise ValueError(f"backend {backend!r} cannot do this call: {reason}")
    return False


def _misplaced(backend: str, x: Tensor) -> str | None:
    interpreted = backend == "triton" and _gpu().INTERPRETED and x.device.type == "cpu"
    right = x.device.type == {"cpu": "cpu", "triton": "cuda"}[backend]
    return None if right or interpreted else f"x is on {x.device.type}"


def _refusal(x: Tensor, rows: int, act: Act) -> str | None:
    if rows > MAX_ROWS or rows == 0:
        return f"x has {rows} rows, not 1 to {MAX_ROWS}"
    if not isinstance(act, str):
        return "the activation is a callable"
    if x.requires_grad and torch.is_grad_enabled():
        return "x requires a gradient"
    return None


def _check_input(x: Tensor, width: int, weight: Tensor) -> int:
    """Returns the number of rows."""
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"x must be [..., {width}], not {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16, not {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weights are on {weight.device}")
    return x.numel() // width


def _check_indices(indices: Tensor, rows: int, device: torch.device) -> None:
    if indices.dtype.is_floating_point or indices.dtype is torch.bool:
        raise ValueError(f"indices must be integers, not {indices.dtype}")
    if indices.dim() not in (1, 2) or (indices.dim() == 2 and indices.shape[0] != rows):
        raise ValueError(f"indices must be [k] or [{rows}, k], not {tuple(indices.shape)}")
    if indices.device != device:
        raise ValueError(f"indices are on {indices.device}, x is on {device}")


# ---- registration: torch knows tensors and numbers, not PackedMLP ----

_PACKED = (
    "Tensor weight, int hidden, bool gated, str act, Tensor? low, Tensor? scale, Tensor? norm, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, Tensor? mean"
)
_Library: Any = torch.library.Library  # torch leaves it without types
_lib = _Library("coreskip", "DEF")
_lib.define(f"mlp(Tensor x, {_PACKED}, Tensor? indices, str rule, int keep, float threshold, float refine) -> Tensor")
_lib.define(f"choose(Tensor x, {_PACKED}, str rule, int keep, float threshold) -> Tensor")
_lib.define(
    "columns(Tensor x, Tensor weight, int out_features, Tensor norm, Tensor? bias, bool by_norm, int keep, "
    "float threshold) -> Tensor"
)
_lib.define(
    "linear(Tensor x, Tensor weight, int in_features, Tensor? scale, Tensor? bias, int? rows, bool whole, "
    "Tensor? counts) -> Tensor"
)


def _fields(packed: PackedMLP) -> tuple[Any, ...]:
    """What `PackedMLP(*fields)` takes, which is what the ops take."""
    p = packed
    biases = (p.gate_bias, p.up_bias, p.down_bias, p.mean)
    return (p.weight, p.hidden_size, p.gated, p.act, p.low, p.scale, p.norm, *biases)


def _linear_fields(packed: PackedLinear) -> tuple[Any, ...]:
    return (packed.weight, packed.in_features, packed.scale, packed.bias, packed.rows, packed.whole, packed.counts)


def _mlp_torch(x: Tensor, *arguments: Any) -> Tensor:
    *fields, indices, rule, keep, threshold, refine = arguments
    packed = PackedMLP(*fields)
    if rule == "listed":
        return reference.mlp(x, packed, indices)
    return reference.mlp_by(x, packed, rule, keep, threshold, refine)


def _choose_torch(x: Tensor, *arguments: Any) -> Tensor:
    *fields, rule, keep, threshold = arguments
    return reference.choose(x, PackedMLP(*fields), rule, keep, threshold)


def _linear_torch(x: Tensor, *fields: Any) -> Tensor:
    return reference.linear(x, PackedLinear(*fields))


@cache
def _usable(backend: str) -> bool:
    reason = available(backend)
    if reason:
        log.warning("decoding with plain torch instead of the %s kernels: %s", backend, reason)
    return reason is None


def _mlp_cpu(x: Tensor, *arguments: Any) -> Tensor:
    if not _usable("cpu"):
        return _mlp_torch(x, *arguments)
    *fields, indices, rule, keep, threshold, refine = arguments
    return cpu.mlp(x, PackedMLP(*fields), indices, rule, keep, threshold, refine)


def _choose_cpu(x: Tensor, *arguments: Any) -> Tensor:
    if not _usable("cpu"):
        return _choose_torch(x, *arguments)
    *fields, rule, keep, threshold = arguments
    return cpu.choose(x, PackedMLP(*fields), rule, keep, threshold)


def _linear_cpu(x: Tensor, *fields: Any) -> Tensor:
    return cpu.linear(x, PackedLinear(*fields)) if _usable("cpu") else _linear_torch(x, *fields)


def _columns_torch(x: Tensor, *arguments: Any) -> Tensor:
    *fields, by_norm, keep, threshold = arguments
    return reference.columns(x, PackedColumns(*fields), by_norm, keep, threshold)


def _columns_cpu(x: Tensor, *arguments: Any) -> Tensor:
    if not _usable("cpu"):
        return _columns_torch(x, *arguments)
    *fields, by_norm, keep, threshold = arguments
    return cpu.columns(x, PackedColumns(*fields), by_norm, keep, threshold)


def _mlp_cuda(x: Tensor, *arguments: Any) -> Tensor:
    if not _usable("triton"):
        return _mlp_torch(x, *arguments)
    *fields, indices, rule, keep, threshold, refine = arguments
    result: Tensor = _gpu().mlp(x, PackedMLP(*fields), indices, rule, keep, threshold, refine)
    return result


def _choose_cuda(x: Tensor, *arguments: Any) -> Tensor:
    if not _usable("triton"):
        return _choose_torch(x, *arguments)
    *fields, rule, keep, threshold = arguments
    result: Tensor = _gpu().choose(x, PackedMLP(*fields), rule, keep, threshold)
    return result


def _on_its_device(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Triton launches on the current device, which need not be the tensors'."""

    @wraps(function)
    def run(x: Tensor, *arguments: Any) -> Tensor:
        with torch.cuda.device(x.device):
            return function(x, *arguments)

    return run


def _mlp_fake(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _choose_fake(x: Tensor, weight: Tensor, hidden: int, *arguments: Any) -> Tensor:
    keep = arguments[-2]
    width = weight.shape[0] if keep < 0 else keep
    return x.new_empty((x.numel() // hidden, width), dtype=torch.int64)


def _columns_fake(x: Tensor, weight: Tensor, out_features: int, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_fake(x: Tensor, *fields: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], PackedLinear(*fields).out_features))


for _name, _any, _cpu, _cuda, _fake in (
    ("mlp", _mlp_torch, _mlp_cpu, _mlp_cuda, _mlp_fake),
    ("choose", _choose_torch, _choose_cpu, _choose_cuda, _choose_fake),
    ("columns", _columns_torch, _columns_cpu, _columns_torch, _columns_fake),
    ("linear", _linear_torch, _linear_cpu, _linear_torch, _linear_fake),
):
    _lib.impl(_name, _any, "CompositeExplicitAutograd")
    _lib.impl(_name, _cpu, "CPU")
    _lib.impl(_name, _on_its_device(_cuda), "CUDA")
    torch.library.register_fake(f"coreskip::{_name}", _fake, lib=_lib)
