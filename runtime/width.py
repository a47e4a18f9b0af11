"""Up to how many rows packed matrices are multiplied as they are, some rows at a time, and from where on unpacked.

Slices of eight (native steps take 16 tokens, where all matrices are tiles) read the packed weights again for each,
which costs little where their arithmetic is what takes the time. Measured on one thread of an AVX2 machine,
microseconds for the embedded model's 1536 x 576 and 576 x 1536
together, torch's float32 product / slices of 4 bits with x in 8 bits / slices of 4 bits with x in float32 / unpacked
and then multiplied: 16 rows 2700 / 1200 / 1900 / 2600, 32 rows 3500 / 1750 / 3600 / 4400, 64 rows 5300 / 3700 / 6600 /
6700. All of a step's small operations and its LM head are faster as slices, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.ops import MAX_ROWS, PackedLinear, linear
from ..kernels.residency import in_memory
from ..kernels.sparse import SparseLinear
from ..kernels.step import StepModel

#: tokens whose products with packed weights are done in slices, where x is rounded to 8 bits, too
MOST_TOKENS = 64
#: and where x stays in float32
MOST_TOKENS_IN_FLOAT32 = 32


def most_rows(parts: Sequence[PackedLinear]) -> int:
    """How many rows of x are multiplied with these parts of a packed matrix in slices, not with the unpacked one."""
    rounded = all(part.grouped and not part.whole for part in parts)
    return MOST_TOKENS if rounded else MOST_TOKENS_IN_FLOAT32


def most_tokens(model: StepModel) -> int:
    """How many tokens a native step takes before the modules are faster. Where weights lie as they were loaded, these
    are the model's own: for more than eight rows torch's product reads them once, not once for every eight."""
    attention = model.layers[0].attention
    if attention is None:
        return MAX_ROWS
    output = attention.o.packed if isinstance(attention.o, SparseLinear) else attention.o
    if isinstance(output, PackedLinear) and output.weight.dtype != model.dtype:
        return most_rows([output])
    return MAX_ROWS


def product(x: Tensor, parts: Sequence[PackedLinear]) -> Tensor:
    """x ``[..., inputs]`` times the matrix whose rows are those of `parts`; each row as a native step has it."""
    return joined([_times(x, run) for part in parts for _, run in in_memory(part)])


def _times(x: Tensor, part: PackedLinear) -> Tensor:
    if x.numel() <= MAX_ROWS * x.shape[-1]:
        return linear(x, part)
    y = torch.cat([linear(rows, part) for rows in x.reshape(-1, x.shape[-1]).split(MAX_ROWS)])
    return y.view(*x.shape[:-1], -1)


def joined(y: Sequence[Tensor]) -> Tensor:
    """The outputs of a matrix's parts, side by side."""
    return y[0] if len(y) == 1 else torch.cat(list(y), -1)
