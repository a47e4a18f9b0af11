"""Products of many rows with packed matrices, which are unpacked for the length of the call: on two threads 6 ms for
all of the embedded model. Some rows of a matrix at a time, so that they stay in the caches and take no memory to speak
of."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import cpu, residency
from ..kernels.memory import allocate
from ..kernels.ops import MAX_ROWS
from ..kernels.packed import PackedLinear
from ..kernels.residency import in_memory
from .width import joined, most_rows, product

_AT_ONCE = 32 << 20  # bytes of a matrix that are put together at once
_WORTH_CASTING = 1 << 16  # numbers of a matrix from which on a product in bfloat16 may take less time


class Unpacking:
    """Unpacks matrices into memory of the calling thread, which is used again: fresh pages for every product would take
    longer than to fill them."""

    def __init__(self) -> None:
        self._memory = threading.local()

    def multiply(
        self, x: Tensor, parts: Sequence[PackedLinear], bias: Tensor | None, dtype: torch.dtype, few: bool
    ) -> Tensor:
        """x ``[..., inputs]`` times the matrix of `dtype` whose rows are those of `parts`, as torch multiplies or, for
        `few` rows (one for each sequence), as a native step does. bias: ``[outputs]`` or None."""
        # matrices that are held as they were loaded: as their modules would
        most = MAX_ROWS if parts[0].weight.dtype == dtype else most_rows(parts)
        if few and x.numel() <= most * x.shape[-1]:
            return product(x, parts)
        if _in_bfloat16(x, parts, dtype):
            xs = x.to(torch.bfloat16)
            y = joined([F.linear(xs, rows).float() for _, rows in self.rows(parts, torch.bfloat16)])
            return y if bias is None else y + bias
        # what autograd keeps until it goes back must not be written over
        fresh = x.requires_grad and torch.is_grad_enabled()
        return joined(
            [
                F.linear(x, rows, None if bias is None else bias[first : first + rows.shape[0]])
                for first, rows in self.rows(parts, dtype, fresh)
            ]
        )

    def rows(
        self, parts: Sequence[PackedLinear], dtype: torch.dtype, fresh: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """The matrix, some rows at a time: the first one's index, and the rows, good until the next are asked for or,
        where they are `fresh`, for good."""
        count, inputs = sum(part.out_features for part in parts), parts[0].in_features
        most = min(count, max(1, _at_once(parts[0]) // (inputs * dtype.itemsize)))
        memory = torch.empty(0, device="cpu") if fresh else self._scratch(most * inputs * dtype.itemsize)
        for first in range(0, count, most):
            shape = min(most, count - first), inputs
            out = (
                torch.empty(shape, dtype=dtype, device="cpu")
                if fresh
                else memory.view(dtype)[: shape[0] * inputs].view(shape)
            )
            yield first, unpack(parts, out, first)

    def _scratch(self, nbytes: int) -> Tensor:
        memory: Tensor | None = getattr(self._memory, "bytes", None)
        if memory is None or memory.nbytes < nbytes:
            with torch.inference_mode(False):  # it may be written to where there is none
                memory = self._memory.bytes = allocate((nbytes,), torch.uint8, torch.device("cpu"))
        return memory[:nbytes]


#: whose memory many modules use in turn
shared = Unpacking()


def scratch_of(weight: Tensor, packed: bool) -> int:
    """Bytes that a matrix is put together in; weight: its shape and dtype. One that is not packed is multiplied with
    whole, as it would be where it lies: torch's sums depend on how many rows it multiplies with."""
    return min(weight.numel() * weight.element_size(), _AT_ONCE if packed else 1 << 62)


def _at_once(part: PackedLinear) -> int:
    holder = residency.of(part.weight.data_ptr())
    if holder is None:
        return _AT_ONCE
    return min(_AT_ONCE, holder.scratch) if part.grouped else holder.scratch


def streamed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x ``[..., inputs]`` times a matrix that is not where its tensor says, see kernels/residency.py; None where it is,
    or where gradients go through it, which need it for longer."""
    holder = residency.of(weight.data_ptr())
    if holder is None or (torch.is_grad_enabled() and x.requires_grad):
        return None
    part = PackedLinear(weight.detach(), weight.shape[1])
    if holder.keeps(weight):
        return F.linear(x, next(in_memory(part))[1].weight, bias)
    return shared.multiply(x, [part], bias, weight.dtype, few=False)


def unpack(parts: Sequence[PackedLinear], out: Tensor, first: int = 0) -> Tensor:
    """Writes rows `first` and following of the matrix that `parts` make up to `out`, which it returns."""
    last, at = first + out.shape[0], 0
    for part in parts:
        begin, end = max(first, at), min(last, at + part.out_features)
        for skipped, run in in_memory(part, begin - at, end - at) if begin < end else ():
            here, to = max(begin, at + skipped), min(end, at + skipped + run.out_features)
            if run.grouped:
                cpu.untile(run, out[here - first : to - first], here - at - skipped)
            else:
                out[here - first : to - first] = run.weight[here - at - skipped : to - at - skipped, : run.in_features]
        at += part.out_features
    return out


def _in_bfloat16(x: Tensor, parts: Sequence[PackedLinear], dtype: torch.dtype) -> bool:
    """Whether a CPU multiplies bfloat16 so much faster that weights of 4 or 8 bits, whose products with a native step's
    x in 8 bits are no closer, are multiplied in it."""
    if dtype != torch.float32 or torch.is_grad_enabled() or not cpu.has_bfloat16_tiles():
        return False
    size = parts[0].in_features * sum(part.out_features for part in parts)
    return size >= _WORTH_CASTING and all(part.grouped and not part.whole for part in parts)
