"""The native CPU backend: finds the compiled library, and calls it with the addresses of tensors.

The library has a plain C interface, so that one build serves every Python; ctypes releases the GIL for the
length of a call.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .arguments import MlpArguments, mismatch
from .cores import quota
from .groups import FORMATS, GROUP, GROUPED, OF_GGUF, TILE
from .memory import allocate
from .packed import ACTS, DTYPES, EXACT_BYTES, PackedColumns, PackedLinear, PackedMLP

MAX_ROWS = 8  # kMaxRows in csrc/formats.h
ISAS = ("avx512", "avx2", "generic")  # best first

ACT = {name: code for code, name in enumerate(ACTS)}
DTYPE = {dtype: code for code, dtype in enumerate((*DTYPES, torch.uint8))}
SLICED = len(DTYPE)
RULE = {"listed": 0, "sketch": 1, "gate": 2}


class Unavailable(RuntimeError):
    """The native library cannot be used here; the message says why."""


@cache
def library() -> ctypes.CDLL:
    """The compiled library, set to the instruction set that CORESKIP_CPU names or to the best one here.

    Raises Unavailable where it was not built, or where this machine lacks the named instruction set.
    """
    try:
        lib = ctypes.CDLL(_file())
    except OSError as error:
        raise Unavailable(f"the compiled CPU kernels cannot be loaded: {error}") from error
    wrong = mismatch(lib)
    if wrong:
        raise Unavailable(f"the compiled CPU kernels are of another version ({wrong}): install coreskip again")
    _declare(lib)
    lib.coreskip_limit(quota() or 0)
    wanted = os.environ.get("CORESKIP_CPU")
    for isa in (wanted,) if wanted else ISAS:
        if lib.coreskip_use(isa.encode()) == 0:
            return lib
    raise Unavailable(f"CORESKIP_CPU={wanted}: this machine has {', '.join(_supported(lib))}")


def _file() -> str:
    # Only `make sanitize` sets the variable: it has a library of its own.
    spec = find_spec(f"{__package__}._cpu")
    file = os.environ.get("CORESKIP_LIBRARY") or (spec and spec.origin)
    if not file:
        raise Unavailable("coreskip was installed without its compiled CPU kernels (no C++ compiler at install time)")
    return file


def use(isa: str) -> None:
    """Switches to "generic", "avx2" or "avx512" for the whole process. Raises Unavailable if the machine lacks it."""
    if library().coreskip_use(isa.encode()) != 0:
        raise Unavailable(f"this machine has no {isa}")


def active() -> str:
    """The instruction set in use."""
    name: bytes = library().coreskip_active()
    return name.decode()


def supported() -> list[str]:
    """The instruction sets that this machine has, best first."""
    chosen = active()
    found = _supported(library())
    use(chosen)
    return found


def _supported(lib: ctypes.CDLL) -> list[str]:
    """Leaves the last of them chosen."""
    return [isa for isa in ISAS if lib.coreskip_use(isa.encode()) == 0]


def _declare(lib: ctypes.CDLL) -> None:
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    lib.coreskip_use.argtypes = [ctypes.c_char_p]
    lib.coreskip_active.restype = ctypes.c_char_p
    lib.coreskip_limit.argtypes, lib.coreskip_limit.restype = [i], None
    lib.coreskip_read.argtypes, lib.coreskip_read.restype = [p, n, i], ctypes.c_uint64
    lib.coreskip_unchanged.argtypes = [p, p, n]
    lib.coreskip_mlp.argtypes = [p, p]
    lib.coreskip_choose.argtypes = [p, p]
    lib.coreskip_columns.argtypes = [p, i, i, n, p, i, n, n, p, n, ctypes.c_float, p, p, i]
    lib.coreskip_linear.argtypes = [p, i, i, n, p, i, n, n, p, p, p, i]
    lib.coreskip_tiles.argtypes = [p, i, i, n, p, i, i, n, n, p, p, i, p, n]
    lib.coreskip_checksum.argtypes, lib.coreskip_checksum.restype = [p, n, n, i], ctypes.c_uint64
    lib.coreskip_untile.argtypes = [p, i, n, n, n, n, i, p, i]
    lib.coreskip_untile_some.argtypes = [p, i, n, n, p, n, i, p, i]
    lib.coreskip_tile_up.argtypes = [p, n, n, n, i, p, i]
    lib.coreskip_take_rows.argtypes, lib.coreskip_take_rows.restype = [p, i, n, p, n, p, i], None
    lib.coreskip_take_columns.argtypes, lib.coreskip_take_columns.restype = [p, i, n, n, p, n, p, i], None
    lib.coreskip_take_some.argtypes, lib.coreskip_take_some.restype = [p, n, n, p, p, n, p, i], None
    lib.coreskip_repack.argtypes = [p, n, n, n, i, p, p, i]
    lib.coreskip_neurons.argtypes = [p, i, i, n, p, i, p, p, n, p, p, p, i]
    lib.coreskip_step.argtypes = [p, p]
    lib.coreskip_generate.argtypes = [p, p, n, p, p, p, p, p]
    lib.coreskip_draft.argtypes = [p, p, n, ctypes.c_float, p, p, p]
    lib.coreskip_embed.argtypes = [p, p, p, n, p, i]
    lib.coreskip_prefill.argtypes = [p, n, n, p]
    lib.coreskip_head.argtypes = [p, p, n, p, i]
    lib.coreskip_stream.argtypes, lib.coreskip_stream.restype = [i, p, p, n, i], p
    lib.coreskip_stream_stop.argtypes, lib.coreskip_stream_stop.restype = [p], None
    lib.coreskip_stream_end.argtypes, lib.coreskip_stream_end.restype = [p], None
    lib.coreskip_slot_bytes.argtypes, lib.coreskip_slot_bytes.restype = [p, n], n
    lib.coreskip_slots.argtypes, lib.coreskip_slots.restype = [i, p, n, p, n, ctypes.c_double, i], p
    lib.coreskip_slots_end.argtypes, lib.coreskip_slots_end.restype = [p], None
    lib.coreskip_slots_figures.argtypes, lib.coreskip_slots_figures.restype = [p, p], None
    lib.coreskip_likeliest.argtypes, lib.coreskip_likeliest.restype = [p, i, n, n, p, p, i], None


def mlp(
    x: Tensor, packed: PackedMLP, indices: Tensor | None, rule: str, keep: int, threshold: float, refine: float
) -> Tensor:
    """The op coreskip::mlp on CPU tensors; `ops.mlp` describes it."""
    return bind(x, packed, indices, rule, keep, threshold, refine)()


def bind(
    x: Tensor, packed: PackedMLP, indices: Tensor | None, rule: str, keep: int, threshold: float, refine: float = 0.0
) -> Callable[[], Tensor]:
    """What `mlp` does, with its arguments in place: each call computes from x's present values into one same tensor.

    Looks at the number of threads once. Raises what `mlp` raises, IndexError only when called.
    """
    x = x.contiguous()
    call = _call(x, packed, rule, keep, threshold)
    call.refine = refine
    if indices is not None:
        if indices.dtype is not torch.int64 or not indices.is_contiguous():
            indices = indices.to(torch.int64).contiguous()
        call.indices, call.count = indices.data_ptr(), indices.shape[-1]
        call.lists = 1 if indices.dim() == 1 else call.rows
    out = torch.empty_like(x)
    native, argument, address = library().coreskip_mlp, ctypes.byref(call), out.data_ptr()

    def run(_alive: object = (x, packed, indices)) -> Tensor:
        check(native(argument, address), call.neurons)
        return out

    return run


def choose(x: Tensor, packed: PackedMLP, rule: str, keep: int, threshold: float) -> Tensor:
    """The op coreskip::choose on CPU tensors; `ops.sketch_select` describes it."""
    x = x.contiguous()
    call = _call(x, packed, rule, keep, threshold)
    out = torch.empty((call.rows, packed.intermediate_size if keep < 0 else keep), dtype=torch.int64, device="cpu")
    check(library().coreskip_choose(ctypes.byref(call), out.data_ptr()), packed.intermediate_size)
    return out


# What a PackedMLP contributes to every call: filling in twenty fields takes 4 us, copying them less than one.
_templates: WeakKeyDictionary[PackedMLP, MlpArguments] = WeakKeyDictionary()


def _call(x: Tensor, packed: PackedMLP, rule: str, keep: int, threshold: float) -> MlpArguments:
    template = _templates.get(packed)
    if template is None:
        template = _templates[packed] = _template(packed)
    call = MlpArguments.from_buffer_copy(template)
    call.x, call.x_dtype, call.rows = x.data_ptr(), DTYPE[x.dtype], x.numel() // packed.hidden_size
    call.rule, call.keep, call.threshold = RULE[rule], keep, threshold
    call.threads = torch.get_num_threads()
    return call


def _template(packed: PackedMLP) -> MlpArguments:
    names = ("weight", "low", "scale", "norm", "gate_bias", "up_bias", "down_bias", "mean")
    sliced = packed.low is not None
    return MlpArguments(
        **{name: address(getattr(packed, name)) for name in names},
        hidden=packed.hidden_size,
        neurons=packed.intermediate_size,
        stride=packed.weight.shape[2] * (2 if sliced else 1),
        w_dtype=SLICED if sliced else DTYPE[packed.weight.dtype],
        gated=packed.gated,
        act=ACT[str(packed.act)],
    )


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """The op coreskip::linear on CPU tensors; `ops.linear` describes it."""
    x = x.contiguous()
    weight = packed.weight
    out = x.new_empty((*x.shape[:-1], packed.out_features))
    if packed.grouped:
        inputs = packed.in_features if packed.counts is None else packed.stride
        x = x if packed.counts is None else packed.in_groups(x)
        status = library().coreskip_tiles(
            x.data_ptr(), DTYPE[x.dtype], x.numel() // inputs, inputs, weight.data_ptr(),
            packed.code, packed.whole, packed.out_features, packed.stride, address(packed.bias),
            out.data_ptr(), torch.get_num_threads(), address(packed.counts), packed.tile,
        )  # fmt: skip
        check(status, 0)
        return out
    status = library().coreskip_linear(
        x.data_ptr(), DTYPE[x.dtype], x.numel() // packed.in_features, packed.in_features,
        weight.data_ptr(), DTYPE[weight.dtype], weight.shape[0], weight.stride(0),
        address(packed.scale), address(packed.bias), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(status, 0)
    return out


def untile(packed: PackedLinear, out: Tensor, first: int = 0) -> Tensor:
    """Writes rows `first` and following of a tiled `packed` to `out`, contiguous [rows, in_features] of a float dtype:
    the numbers of `packed.untile`, rounded to that dtype. Returns `out`."""
    assert packed.grouped, packed
    assert out.is_contiguous(), out.stride()
    assert out.shape[1] == packed.in_features, out.shape
    assert first + out.shape[0] <= packed.out_features, (first, out.shape)
    status = library().coreskip_untile(
        packed.weight.data_ptr(), packed.code, packed.stride // GROUP, packed.in_features, first,
        out.shape[0], DTYPE[out.dtype], out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(status, 0)
    return out


def rows_at(packed: PackedLinear, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a tiled matrix, [.., in_features] of a float dtype, by their numbers, int64 [..].

    Raises IndexError for numbers of no row.
    """
    ids = ids.to(torch.int64).contiguous()
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < packed.out_features):
        raise IndexError(f"token ids must be in [0, {packed.out_features})")
    out = torch.empty((*ids.shape, packed.in_features), dtype=dtype, device="cpu")
    library().coreskip_untile_some(
        packed.weight.data_ptr(), packed.code, packed.stride // GROUP, packed.in_features, ids.data_ptr(), ids.numel(),
        DTYPE[dtype], out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def pack_exactly(weight: Tensor, bias: Tensor | None = None, *, most: float = 1.0) -> PackedLinear | None:
    """The very numbers of a float32 `weight`, [out_features, in_features], in fewer bytes: at most `most` of its own.

    Models that were made of 4-bit or 8-bit groups, bfloat16 or float16 and then loaded in float32 have such a form. x
    meets the numbers in float32. None where there is none, or `weight` is of another dtype.
    """
    form = exact_form(weight)
    if form is None or EXACT_BYTES[form] > most * weight.element_size():
        return None
    if form not in GROUPED:
        narrow = weight.detach().to(getattr(torch, form))
        return PackedLinear.pack(narrow, bias) if torch.equal(narrow.float(), weight) else None
    tiles = _tile_up(weight.detach(), form)
    biases = None if bias is None else bias.detach().float().contiguous()
    return tiles if tiles is None else PackedLinear(tiles, weight.shape[1], None, biases, weight.shape[0], whole=True)


def exact_form(weight: Tensor) -> str | None:
    """In which form fewer bytes hold the numbers of a float32 matrix, as far as its first groups tell: "int4",
    "int8_groups", "bfloat16" or "float16", the fewest bytes first; None: in none of them, or CORESKIP_NARROW=0 wants
    matrices to be read where they lie."""
    if os.environ.get("CORESKIP_NARROW") == "0":
        return None
    return next((form for form in EXACT_BYTES if holds(form, weight)), None)


def holds(form: str, weight: Tensor) -> bool:
    """Whether one of those forms holds the numbers of a float32 matrix, as far as its first groups tell."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.dim() != 2:
        return False
    if weight.numel() == 0 or weight.stride(1) != 1:
        return False
    some = weight.detach()[:1, : 8 * GROUP]
    if form in GROUPED:
        return _tile_up(some, form) is not None
    return torch.equal(some.to(getattr(torch, form)).float(), some)


def _tile_up(weight: Tensor, fmt: str) -> Tensor | None:
    """The tiles of PackedLinear that stand for just these numbers, or None."""
    rows, width = weight.shape
    tiles = allocate((-(-rows // TILE), -(-width // GROUP), FORMATS[fmt].tile_bytes), torch.uint8, weight.device)
    exact = library().coreskip_tile_up(
        weight.data_ptr(),
        weight.stride(0),
        rows,
        width,
        FORMATS[fmt].code,
        tiles.data_ptr(),
        torch.get_num_threads(),
    )
    return tiles if exact else None


def tiles_of_gguf(raw: Tensor, kind: str, order: Tensor | None = None, *, whole: bool = True) -> PackedLinear:
    """The matrix of a GGUF file, number for number, as far as `packed.OF_GGUF` knows its type.

    raw: uint8 [out_features, bytes of a row], contiguous, as it lies in the file; kind: "Q4_0", "Q6_K" or another key
    of `OF_GGUF`; order: int64 [out_features], the file's row that comes to each place, or None: as they are. whole: x
    meets the numbers in float32, not rounded to 8 bits.
    Raises ValueError where rows are no whole number of the type's blocks, KeyError for another type.
    """
    name = OF_GGUF[kind]
    form, (rows, row_bytes) = FORMATS[name], raw.shape
    block = gguf_bytes(kind)
    blocks = row_bytes // block
    if raw.dtype != torch.uint8 or row_bytes != blocks * block or blocks == 0:
        raise ValueError(f"a row of {kind} must have a multiple of {block} bytes as uint8, not {row_bytes} {raw.dtype}")
    if order is not None:
        if order.shape != (rows,) or order.dtype != torch.int64 or not bool(((order >= 0) & (order < rows)).all()):
            raise ValueError(f"order must name a row of {rows} for each, as int64")
        order = order.contiguous()
    raw = raw.contiguous()
    tiles = allocate((-(-rows // TILE), blocks, form.tile_bytes), torch.uint8, raw.device)
    done = library().coreskip_repack(
        raw.data_ptr(), row_bytes, rows, blocks, form.code, address(order), tiles.data_ptr(), torch.get_num_threads()
    )
    assert done, (kind, raw.shape)
    return PackedLinear(tiles, blocks * form.groups * GROUP, rows=rows, whole=whole)


def gguf_bytes(kind: str) -> int:
    """Bytes of a block of a GGUF type among `OF_GGUF`: of 32 inputs, or of 256."""
    form = FORMATS[OF_GGUF[kind]]
    # the 6-bit scales and leasts of Q4_K and Q5_K are bytes in tiles
    return form.tile_bytes // TILE - (4 if form.nested and not form.centred else 0)


def columns(x: Tensor, packed: PackedColumns, by_norm: bool, keep: int, threshold: float) -> Tensor:
    """The op coreskip::columns on CPU tensors; `ops.column_linear` describes it."""
    x = x.contiguous()
    weight = packed.weight
    out = x.new_empty((*x.shape[:-1], packed.out_features))
    status = library().coreskip_columns(
        x.data_ptr(), DTYPE[x.dtype], x.numel() // packed.in_features, packed.in_features,
        weight.data_ptr(), DTYPE[weight.dtype], packed.out_features, weight.shape[1],
        packed.norm.data_ptr() if by_norm else None, keep, threshold,
        address(packed.bias), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(status, 0)
    return out


@cache
def has_bfloat16_tiles() -> bool:
    """Whether torch multiplies bfloat16 matrices by AMX here: two to three times as fast as float32 ones."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return torch.cpu._is_amx_tile_supported() and ("AMX" in allowed or allowed in ("", "ALL", "DEFAULT"))


def read(memory: Tensor) -> int:
    """Reads a contiguous tensor once with all threads and returns a sum over it: the memory's speed, timed."""
    total: int = library().coreskip_read(memory.data_ptr(), memory.nbytes, torch.get_num_threads())
    return total


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def check(status: int, neurons: int) -> None:
    if status == 1:
        raise IndexError(f"indices must be -1 (nothing) or in [0, {neurons})")
    if status == 2:
        raise MemoryError("no memory for the CPU kernels' workspace")
    if status == 4:
        raise OSError("the weights could not be read")
