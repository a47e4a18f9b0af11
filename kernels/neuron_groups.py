"""An MLP in 4-bit groups of which neurons are left out: what is read of one neuron lies side by side.

csrc/arguments.h describes the bytes. They are the numbers of the three matrices' "int4" tiles, to the bit: a step that
computes every neuron over them computes what a dense step does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from . import cpu
from .arguments import NeuronGroups as Argument
from .groups import FORMATS, GROUP, tiles_from_groups, ungroup, untile
from .memory import LINE, allocate
from .packed import Act, PackedLinear, means_of, nibbles_of, spread
from .residency import copied

RUN = 64  # inputs or outputs whose nibbles lie in 32 bytes; kRun in csrc/vector/neuron_groups.h
_BLOCK = 16  # groups; kBlock there
_LONG = 512  # bytes of a row that is worth padding
UPPER = "int4_upper"  # the upper three bits of "int4"
#: How neurons are found. ``listed``; or by what each token reads of all of them: ``rows``, gate and up whole,
#: ``planes``, their upper three bits, ``gates``, the gates whole.
Form = Literal["listed", "rows", "planes", "gates"]


@dataclass(frozen=True, eq=False, repr=False)
class PackedNeurons:
    """One layer's MLP, down(act(gate(x)) * up(x)) or down(act(up(x))), in 4-bit groups by neuron. Made by `pack`.

    Listed, `rows` hold gate, up and down of each neuron, or of those alone that `place`, int32 [neurons], has a row
    for. In other forms `scan` holds, in tiles, what each token reads
    of all neurons, `rest` what it then reads of candidates, last bits or up rows, and `rows` the down projection.
    `ends`: float16 [groups of 32 neurons, 2, width], scales and leasts of the down projection. norm: what a unit of an
    activation costs that is left out, float32 [neurons]; reach: what a unit of act(gate) may come to, times that; mean:
    what each neuron counts as where it is left out, see `PackedMLP`.
    """

    rows: Tensor
    ends: Tensor
    hidden_size: int
    intermediate_size: int
    gated: bool
    act: Act
    form: Form = "listed"
    scan: Tensor | None = None
    rest: Tensor | None = None
    norm: Tensor | None = None
    reach: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    mean: Tensor | None = None
    place: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def pack(
        cls,
        gate: PackedLinear | None,
        up: PackedLinear,
        down: PackedLinear,
        *,
        act: Act,
        form: Form = "listed",
        only: Tensor | None = None,
    ) -> PackedNeurons:
        """The numbers of "int4" tiles with their biases; gate is None for a plain MLP. `reach` is to be added to gates.
        only: of listed neurons those that are packed, int64, ascending; nobody may list others. None: all.

        Raises ValueError for another format, or shapes that do not fit.
        """
        parts = [up] if gate is None else [gate, up]
        _check(parts, down, form)
        width = -(-up.in_features // RUN) * RUN
        groups = [_padded(_only(untile(copied(part)), only), width // GROUP) for part in parts]
        outputs_of = untile(copied(down))
        outputs = _padded_rows(outputs_of, width)
        columns = _columns(outputs[0], up.out_features, only)
        scanned = {"listed": [], "gates": groups[:1]}.get(form, groups)
        rest = [_last_bits(part[0]) for part in groups] if form == "planes" else []
        rest += [_row(*groups[1])] if form == "gates" else []
        rows = [*(_row(*part) for part in groups), columns] if form == "listed" else [columns]
        return cls(
            rows=_side_by_side(rows),
            ends=torch.stack([outputs[1].t(), outputs[2].t()], 1).contiguous(),
            hidden_size=up.in_features,
            intermediate_size=up.out_features,
            gated=gate is not None,
            act=act,
            form=form,
            scan=_scan(scanned, _scanned_in(form)) if scanned else None,
            rest=_side_by_side(rest) if rest else None,
            norm=ungroup(*outputs_of).flatten(1)[:, : up.out_features].norm(dim=0) if scanned else None,
            gate_bias=None if gate is None else gate.bias,
            up_bias=up.bias,
            down_bias=down.bias,
            place=None if only is None else _places(only, up.out_features),
        )

    def scored(self, norm: Tensor | None, reach: Tensor | None = None) -> PackedNeurons:
        """With other norms than those of down rows, where there are any, and with reaches."""
        given = {"norm": self.norm if norm is None else norm, "reach": reach}
        floats = {name: None if t is None else t.to("cpu", torch.float32).contiguous() for name, t in given.items()}
        return replace(self, norm=floats["norm"], reach=floats["reach"])

    def compensated(self, mean: Tensor) -> PackedNeurons:
        """See `PackedMLP.compensated`."""
        return replace(self, **means_of(self, mean))

    def down_rows(self) -> Tensor:
        """The down projection as it is computed with, float32 [intermediate_size, hidden_size]."""
        width = self.ends.shape[2]
        nibbles = self.rows[:, self._before_down() :][:, : width // 2]
        numbers = torch.empty((self.intermediate_size, width), dtype=torch.float32, device="cpu")
        numbers[:, _order(width)] = spread(nibbles, RUN).float()
        scale, least = self.ends.float().repeat_interleave(GROUP, 0)[: self.intermediate_size].unbind(1)
        return (numbers * scale + least)[:, : self.hidden_size]

    def _before_down(self) -> int:
        width = self.ends.shape[2]
        return 0 if self.form != "listed" else (2 if self.gated else 1) * (width // 2 + width // GROUP * 4)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def argument(self, threshold: float = 0.0, refine: float = 0.0) -> Argument:
        """As native code reads it. threshold, refine: see `SparseMLP`."""
        names = ("scan", "rows", "rest", "ends", "norm", "reach", "gate_bias", "up_bias", "mean", "place")
        return Argument(
            **{name: cpu.address(getattr(self, name)) for name in names},
            neurons=self.intermediate_size,
            width=self.ends.shape[2],
            row_bytes=self.rows.stride(0),
            rest_bytes=0 if self.rest is None else self.rest.stride(0),
            threshold=threshold,
            refine=refine,
            format=FORMATS[_scanned_in(self.form)].code,
            gated=self.gated,
        )

    def __repr__(self) -> str:
        return f"PackedNeurons({self.hidden_size}x{self.intermediate_size}, int4, {self.form}, act={self.act})"


def neurons(
    x: Tensor,
    packed: PackedNeurons,
    indices: Tensor | None = None,
    selected: Tensor | None = None,
    *,
    threshold: float = 0.0,
    refine: float = 0.0,
) -> tuple[Tensor, int]:
    """The MLP of x ``[.., hidden]`` of up to 8 rows, over listed neurons or those that the tokens choose.

    indices: int64, ascending, without repeats; None: all. selected: uint8 [neurons, rows], which rows want a neuron of
    the list; None: all do. threshold: of estimates from the upper bits, the least whose last bits are read; refine: of
    exact scores, the least that is kept. Returns the output, and how many neurons were scanned and left out.
    Raises ValueError for neurons that are not there, and more rows than one call takes.
    """
    x = x.contiguous()
    rows = x.numel() // packed.hidden_size
    if rows > cpu.MAX_ROWS:
        raise ValueError(f"{rows} rows at once: at most {cpu.MAX_ROWS}")
    count = packed.intermediate_size if indices is None else indices.numel()
    if indices is not None:
        _check_list(indices, packed.intermediate_size)
    out, left, argument = torch.empty_like(x), ctypes.c_int64(0), packed.argument(threshold, refine)
    status = cpu.library().coreskip_neurons(
        x.data_ptr(), cpu.DTYPE[x.dtype], rows, packed.hidden_size, ctypes.byref(argument), cpu.ACT[str(packed.act)],
        cpu.address(packed.down_bias), cpu.address(indices), count, cpu.address(selected), out.data_ptr(),
        ctypes.byref(left), torch.get_num_threads(),
    )  # fmt: skip
    cpu.check(status, 0)
    return out, left.value


# ---- packing ----

Groups = tuple[Tensor, Tensor, Tensor]  # q, scale and least of rows, as `untile` has them


def _scanned_in(form: Form) -> str:
    """The format of the tiles that each token reads of all neurons."""
    return UPPER if form == "planes" else "int4"


def _check(parts: list[PackedLinear], down: PackedLinear, form: Form) -> None:
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, not {form!r}")
    if form == "gates" and len(parts) == 1:
        raise ValueError("a plain MLP has no gates to choose by")
    for part in (*parts, down):
        if part.fmt != "int4":
            raise ValueError(f"neurons by 4-bit groups come from int4 tiles, not {part.fmt}")
    shapes = {(part.out_features, part.in_features) for part in parts} | {(down.in_features, down.out_features)}
    if len(shapes) > 1:
        raise ValueError(f"gate and up must be [intermediate, hidden], down the reverse, not {sorted(shapes)}")


def _check_list(indices: Tensor, neurons: int) -> None:
    if indices.dtype != torch.int64 or not indices.is_contiguous() or indices.dim() != 1:
        raise ValueError("neurons are listed as int64, in one row")
    if indices.numel() and (int(indices[0]) < 0 or int(indices[-1]) >= neurons or bool((indices.diff() <= 0).any())):
        raise ValueError(f"listed neurons must ascend within 0..{neurons - 1}")


def _padded(part: Groups, groups: int) -> Groups:
    """With groups of zeros up to so many."""
    more = groups - part[0].shape[1]
    pad = torch.nn.functional.pad
    return pad(part[0], (0, 0, 0, more)), pad(part[1], (0, more)), pad(part[2], (0, more))


def _padded_rows(part: Groups, rows: int) -> Groups:
    more = rows - part[0].shape[0]
    pad = torch.nn.functional.pad
    return pad(part[0], (0, 0, 0, 0, 0, more)), pad(part[1], (0, 0, 0, more)), pad(part[2], (0, 0, 0, more))


def _row(q: Tensor, scale: Tensor, least: Tensor) -> Tensor:
    """The bytes of each row: nibbles, scales and leasts."""
    ends = [t.contiguous().view(torch.uint8) for t in (scale, least)]
    return torch.cat([_in_blocks(q, _block_nibbles, _nibbles), *ends], 1)


def _only(part: Groups, rows: Tensor | None) -> Groups:
    return part if rows is None else (part[0][rows], part[1][rows], part[2][rows])


def _places(only: Tensor, neurons: int) -> Tensor:
    """Where the rows of these neurons are; of others, that there are none."""
    places = torch.full((neurons,), -1, dtype=torch.int32, device="cpu")
    places[only] = torch.arange(only.numel(), dtype=torch.int32, device="cpu")
    return places


def _columns(q: Tensor, neurons: int, only: Tensor | None) -> Tensor:
    """The nibbles of each input's column, outputs in the order in which they are added."""
    columns = q.flatten(1).t()[:neurons]
    columns = columns if only is None else columns[only]
    return _nibbles(columns[:, _order(columns.shape[1])])


def _order(width: int) -> Tensor:
    """Which output stands at each place: in runs of 64, place 16 L + 4 b + j holds output 16 b + 4 L + j, so that four
    neurons' bytes, interleaved twice in each 128 bits, give outputs in order."""
    run = torch.arange(RUN, device="cpu").view(4, 4, 4).transpose(0, 1).flatten()
    return (torch.arange(0, width, RUN, device="cpu")[:, None] + run).flatten()


def _nibbles(values: Tensor) -> Tensor:
    return nibbles_of(values, RUN)


def _in_blocks(q: Tensor, of_block: Callable[[Tensor], Tensor], of_runs: Callable[[Tensor], Tensor]) -> Tensor:
    """[rows, groups, 32] -> the bytes of blocks of 16 groups, whose numbers come as [.., step, group, four], and of the
    groups that are left, as they are."""
    rows, groups, _ = q.shape
    inside = groups // _BLOCK * _BLOCK
    blocks = q[:, :inside].reshape(rows, -1, _BLOCK, GROUP // 4, 4).transpose(2, 3)
    return torch.cat([of_block(blocks).flatten(1), of_runs(q[:, inside:].flatten(1))], 1)


def _block_nibbles(steps: Tensor) -> Tensor:
    return steps[:, :, : GROUP // 8] | steps[:, :, GROUP // 8 :] << 4


def _last_bits(q: Tensor) -> Tensor:
    """[rows, groups, 32] -> a bit each, [rows, bytes]."""
    return _in_blocks(q & 1, _bits, _bits)


def _bits(values: Tensor) -> Tensor:
    """[rows, ..] of 0 and 1 -> [rows, bytes]."""
    bits = values.flatten(1).reshape(values.shape[0], -1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(-1, dtype=torch.uint8)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Rows of bytes, one after the other. Long ones begin on a cache line, at an odd number of lines from the next:
    where all rows lie 1 KB apart, what is fetched of them falls into the same places of the cache, and a layer of
    576 x 1536 takes up to twice as long."""
    size = sum(part.shape[1] for part in parts)
    stride = size if size < _LONG else (-(-size // LINE) | 1) * LINE
    rows = allocate((parts[0].shape[0], stride), torch.uint8, parts[0].device)
    rows[:, size:] = 0
    at = 0
    for part in parts:
        rows[:, at : at + part.shape[1]] = part
        at += part.shape[1]
    return rows


def _scan(parts: list[Groups], fmt: str) -> Tensor:
    """uint8 [tiles, parts, groups, bytes]: the tiles of gate and up side by side."""
    tiles = torch.stack([tiles_from_groups(*part, fmt) for part in parts], 1)
    return allocate(tuple(tiles.shape), torch.uint8, tiles.device).copy_(tiles)
