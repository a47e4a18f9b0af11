"""The decode step of a GPU as a sequence of kernels (kernels/gpu_step.py), for a model and a program: norm, q, k and v,
rotation and KV write, attention in parts of the KV length, output, norm, gate and up, activation, down, LM head.

Residuals are added, and what leaves a half is normed, by the launch that norms what the next half reads: six small
launches a layer beside the products with matrices. Nothing is read back to the host.

The whole step has not run on a GPU yet; tests run its definitions on CPU tensors, and the kernels in Triton's
interpreter.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import replace
from typing import Any, Literal, Protocol, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..kernels import gpu_latents as latents
from ..kernels import gpu_step as kernel
from ..kernels.experts import Router
from ..kernels.gpu_formats import ByRow, FloatMatrix, GroupedMatrix, Inputs, Matrix
from ..kernels.packed import ACTS, PackedMLP
from ..kernels.sparse import ExactScores, SignScores, SlimMLP, SparseLinear, SparseMLP
from ..kernels.step_model import Norm
from ..predictors.anatomy import Anatomy
from .calls import NotCovered, NotThisCall
from .gpu_matrices import SlicedMLP
from .gpu_model import GpuAttention, GpuExperts, GpuLatent, GpuLayer, GpuMLP, GpuModel, GpuPacking, describe, lower
from .gpu_place import Place
from .lower_cpu import StepProgram
from .program import Program
from .spec import ModelSpec

logger = logging.getLogger("coreskip")

_ATTENTION, _MLP = ("q", "k", "v"), ("gate", "up")


class _Stream:
    """The residual stream, float32 ``[tokens, hidden]``, and what is to be added to it when it is read next."""

    def __init__(self, x: Tensor, dtype: torch.dtype) -> None:
        self._x, self._dtype = x, dtype
        self._deltas: list[Tensor] = []
        self._out: Norm | None = None  # of the first of them
        self._after: Norm | None = None
        self._scale = 1.0

    def add(self, delta: Tensor, out: Norm | None, scale: float) -> None:
        """+= scale * out(delta)."""
        if self._after is not None or len(self._deltas) == 2 or (self._deltas and (out or scale != self._scale)):
            self._settle()
        if not self._deltas:
            self._out, self._scale = out, scale
        self._deltas.append(delta)

    def norm(self, after: Norm | None) -> None:
        """= after(itself)."""
        if after is not None and self._after is not None:
            self._settle()
        self._after = after or self._after

    def read(
        self,
        norm: Norm | None,
        second: Norm | None = None,
        quantize: bool | Literal["row"] = False,
        smooth: Tensor | None = None,
    ) -> tuple[Inputs, Inputs]:
        """norm(itself), and second(itself) or the same again; see `gpu_step.add_norm`."""
        found = kernel.add_norm(
            self._x, norm, *self._deltas, out=self._out, after=self._after, second=second, scale=self._scale,
            quantize=quantize, smooth=smooth, dtype=self._dtype,
        )  # fmt: skip
        self._x, self._deltas, self._out, self._after = found.stream, [], None, None
        return found.y, found.y if found.second is None else found.second

    def _settle(self) -> None:
        self.read(None)


class GpuStep:
    """A step of some tokens of each of a place's sequences, under a program. A second call does what the first did.

    Args:
        skipped: neurons that a token leaves out.
        form: see kernels/gpu_step.py.
    """

    def __init__(
        self, model: GpuModel, program: StepProgram, skipped: float, place: Place, tokens: int, form: kernel.Form | None
    ) -> None:
        self._model, self._program, self._place, self._tokens = model, program, place, tokens
        self.skipped, self._form, self._mlps = skipped, form, _bundles(program)
        self._rotations: dict[str | None, tuple[Tensor, Tensor]] = {}
        self._routers: dict[int, Router] = {}  # that choose otherwise than the model's
        self._lists: dict[int, Tensor] = {}
        self._inverse: dict[int, Tensor] = {}  # int64 [neurons]: where each is listed, or -1
        with torch.inference_mode(False):
            rows = place.rows * tokens
            self._counters = torch.zeros(rows * kernel.COUNTERS, dtype=torch.int32, device=place.device)
            self._rows = torch.arange(place.rows * tokens, device=place.device)
            self._ahead = torch.arange(tokens, device=place.device).repeat(place.rows)
            for index, (kept, least) in program.experts.items():
                router = cast(GpuExperts, model.layers[index].mlp).router
                kept = None if kept is None else torch.empty_like(kept, device=place.device)
                self._routers[index] = replace(router, kept=kept, least=least)
            for index, mlp in enumerate(program.mlps):
                if isinstance(mlp, SlicedMLP) and mlp.lists is not None:
                    self._inverse[index] = self._rows.new_empty(mlp.groups.intermediate_size)
                if mlp is not None and mlp.lists is not None:
                    self._lists[index] = torch.empty_like(mlp.lists.listed, dtype=torch.int64)
        self._chosen: Any = lambda: None
        self.choose(program)

    def choose(self, program: StepProgram) -> None:
        """Takes over the neurons and experts that a program's sequences chose; it differs in nothing else."""
        if self._chosen() is program:
            return
        for index, router in self._routers.items():
            if router.kept is not None:
                router.kept.copy_(cast(Tensor, program.experts[index][0]))
        for index, to in self._lists.items():
            to.copy_(cast(Any, program.mlps[index]).lists.listed)
        for index, to in self._inverse.items():
            listed = self._lists[index]
            to.fill_(-1).scatter_(0, listed, torch.arange(listed.numel(), device=to.device))
        self._chosen = ref(program)

    def __call__(self) -> Tensor:
        """Logits ``[rows, tokens, vocabulary]`` of the place's first tokens, whose keys and values are written."""
        model, spec, place = self._model, self._model.spec, self._place
        ids, positions = (t[:, : self._tokens].reshape(-1) for t in (place.ids, place.positions))
        self._at = place.at + self._ahead
        self._rotations = {kind: make(positions) for kind, make in model.rotations.items()}
        x = kernel.embed(ids, model.table, scale=spec.embedding_scale or 1.0, dtype=torch.float32)
        if model.places is not None:  # beyond the end nothing that is asked for lies
            x = x + model.places.index_select(0, positions.clamp(0, model.places.shape[0] - 1))
        stream = _Stream(x, spec.dtype)
        stream.norm(model.embedding_norm)
        for index, layer in enumerate(model.layers):
            self._layer(index, layer, stream)
        y, _ = stream.read(model.norm, quantize=_grouped(model.head))
        logits = kernel.linear(y, model.head, dtype=torch.float32, form=self._form)
        if spec.logit_scale != 1.0:
            logits = logits * spec.logit_scale
        if spec.logit_softcap:
            logits = spec.logit_softcap * torch.tanh(logits / spec.logit_softcap)
        return logits.to(spec.dtype).view(place.rows, self._tokens, -1)

    # --- a layer

    def _layer(self, index: int, layer: GpuLayer, stream: _Stream) -> None:
        attends, computes = index not in self._program.no_attention, index not in self._program.no_mlp
        if layer.parallel and computes:
            of_attention, of_mlp = self._both(index, layer, stream)
            y = self._attention(index, layer.attention, of_attention, attends)
            stream.add(self._mlp(index, layer, of_mlp), layer.mlp_out, layer.residual_scale)
            if y is not None:
                stream.add(y, layer.attention_out, layer.residual_scale)
        else:
            x, _ = stream.read(layer.attention_in, quantize=self._quantizes(index, _ATTENTION, layer))
            y = self._attention(index, layer.attention, x, attends)
            if y is not None:
                stream.add(y, layer.attention_out, layer.residual_scale)
            stream.norm(layer.attention_after)
            if computes:
                x = self._of_mlp(index, layer, stream)
                stream.add(self._mlp(index, layer, x), layer.mlp_out, layer.residual_scale)
        stream.norm(layer.mlp_after)

    def _both(self, index: int, layer: GpuLayer, stream: _Stream) -> tuple[Inputs, Inputs]:
        """What attention and MLP read of one and the same stream."""
        quantize = self._quantizes(index, _ATTENTION, layer)
        if self._quantizes(index, _MLP, layer) is quantize and layer.mlp_in is not None:
            return stream.read(layer.attention_in, layer.mlp_in, quantize)
        x, _ = stream.read(layer.attention_in, quantize=quantize)
        return x, self._of_mlp(index, layer, stream)

    def _of_mlp(self, index: int, layer: GpuLayer, stream: _Stream) -> Inputs:
        """What an MLP reads of the stream."""
        sparse = self._mlps[index]
        quantize = self._quantizes(index, _MLP, layer)
        return stream.read(layer.mlp_in, None, quantize, sparse.smooth if sparse and quantize == "row" else None)[0]

    def _quantizes(self, index: int, names: tuple[str, ...], layer: GpuLayer) -> bool | Literal["row"]:
        """Whether what reads a norm's output reads it in 8 bits, and by groups or by row."""
        if self._program.columns.get(index, {}).keys() & set(names):
            return False
        if names is _ATTENTION:
            return _grouped(layer.attention.inputs[0])
        sparse = self._mlps[index]
        if sparse is not None and not isinstance(sparse, SlicedMLP):
            return "row" if sparse.rule == "sketch" and _has_kernel(sparse) else False
        return isinstance(layer.mlp, GpuMLP) and _grouped(layer.mlp.widening[0])

    def _attention(self, index: int, a: GpuAttention | GpuLatent, x: Inputs, attends: bool) -> Tensor | None:
        """What an attention gives, or where it is skipped nothing; its keys and values are written."""
        if isinstance(a, GpuLatent):
            return self._latent(index, a, x, attends)
        spec, place, columns = a.spec, self._place, self._program.columns.get(index, {})
        keys, values = place.buffers[index]
        whole = attends or columns.keys() & set(_ATTENTION)
        qkv = self._product(x, a.inputs if whole else a.entries, columns, _ATTENTION)
        q = kernel.rotary_write(
            qkv, keys, values, self._at,
            heads=a.heads if attends else 0,
            places=a.order if whole else a.entries_order,
            rotation=self._rotations.get(spec.rotation), positions=self._rows, paired=spec.paired,
            q_norm=a.q_norm if attends else None, k_norm=a.k_norm, turned=spec.turned,
        )  # fmt: skip
        if not attends:
            return None
        y = kernel.attention(
            q, keys, values, self._at,
            seen=place.seen, scale=spec.scale, window=spec.window, softcap=spec.softcap, slopes=a.slopes,
            sinks=a.sinks, quantize=_grouped(a.output) and "o" not in columns, dtype=self._model.spec.dtype,
            counters=self._counters,
        )  # fmt: skip
        return self._product(y, (a.output,), columns, ("o",))

    def _latent(self, index: int, a: GpuLatent, x: Inputs, attends: bool) -> Tensor | None:
        """`_attention` over latents."""
        spec, dtype, (keys, values) = a.spec, self._model.spec.dtype, self._place.buffers[index]
        wide = kernel.linears(x, a.inputs, dtype=torch.float32, form=self._form)
        q, kv = wide.split([wide.shape[1] - keys.shape[3] - values.shape[3], keys.shape[3] + values.shape[3]], 1)
        if a.q is not None:
            low = kernel.add_norm(q, a.q_low_norm, quantize=_grouped(a.q), dtype=dtype).y
            q = kernel.linear(low, a.q, dtype=torch.float32, form=self._form)
        q = q.unflatten(1, (spec.heads, -1))
        turned = latents.latent_write(
            q, kv, keys, values, self._at, norm=a.kv_low_norm, rotation=self._rotations[spec.rotation],
            positions=self._rows, paired=spec.paired, apart=spec.apart,
        )  # fmt: skip
        if not attends:
            return None
        y = latents.latent_attention(
            latents.head_products(q[..., : -spec.rope], a.of_keys), turned, keys, values, self._at,
            scale=spec.scale, seen=self._place.seen, window=spec.window, counters=self._counters,
        )  # fmt: skip
        y = latents.head_products(y, a.of_values).flatten(1)
        return self._product(y, (a.output,), self._program.columns.get(index, {}), ("o",))

    def _mlp(self, index: int, layer: GpuLayer, x: Inputs) -> Tensor:
        sparse, dense, columns = self._mlps[index], layer.mlp, self._program.columns.get(index, {})
        if isinstance(dense, GpuExperts):
            return self._mixture(dense, self._routers.get(index, dense.router), cast(Tensor, x))
        if sparse is not None and not isinstance(sparse, SlicedMLP):
            return self._bundled(index, sparse, x)
        names, dtype = _MLP if dense.gated else ("up",), self._model.spec.dtype
        quantize = _grouped(dense.down) and "down" not in columns
        if index in self._inverse:  # neurons that prompts choose: the down projection meets 0 in place of others
            halves = cast(SlicedMLP, sparse).groups.halves
            wide = kernel.linears(x, halves, dtype=torch.float32, form=self._form, rows=self._lists[index])
            h = kernel.act_mul(
                wide, dense.act, gated=dense.gated, inverse=self._inverse[index], quantize=quantize, dtype=dtype
            )
        elif not columns.keys() & set(names):
            h = kernel.activated(
                x, dense.widening, dense.act, gated=dense.gated, quantize=quantize, dtype=dtype, form=self._form
            )
        elif columns.keys() >= set(names):
            h = self._columns(cast(Tensor, x), [columns[name] for name in names], dense.act)
        else:
            wide = self._product(x, dense.widening, columns, names)
            h = kernel.act_mul(wide, dense.act, gated=dense.gated, quantize=quantize, dtype=dtype)
        return self._product(h, (dense.down,), columns, ("down",))

    def _mixture(self, mixture: GpuExperts, router: Router, x: Tensor) -> Tensor:
        """The experts that a router chooses, and the shared one."""
        wide = kernel.linears(x, mixture.logits, dtype=torch.float32, form=self._form)
        more, shared = None, mixture.shared
        gate = wide[:, router.count :] if len(mixture.logits) == 2 else None
        weights, chosen = kernel.route(wide[:, : router.count], router)
        if shared is not None:
            h = kernel.activated(
                x, shared.widening, shared.act, gated=shared.gated, quantize=_grouped(shared.down),
                dtype=self._model.spec.dtype, form=self._form,
            )  # fmt: skip
            more = kernel.linear(h, shared.down, dtype=torch.float32, form=self._form)
        return kernel.experts(
            x, mixture.matrices, chosen, weights, more=more, gate=gate, more_scale=mixture.shared_scale
        )

    def _bundled(self, index: int, sparse: SparseMLP, x: Inputs) -> Tensor:
        """Neurons that are listed, or that a rule chooses: by the one-pass kernels where they know the rule."""
        if not _has_kernel(sparse):
            return sparse.run(cast(Tensor, x))[0].float()
        packed, rule, threshold = cast(PackedMLP, sparse.packed), sparse.rule, sparse.threshold
        if rule == "sketch":
            indices = None
            if threshold is None:
                indices = kernel.pick(kernel.sketch_scores(cast(ByRow, x), packed), keep=sparse.keep)
            return kernel.sketch_mlp(
                cast(ByRow, x), packed, indices=indices, threshold=threshold, refine=sparse.refine
            )  # fmt: skip
        indices, by = self._lists.get(index), "gate" if rule == "gate" else "listed"
        if isinstance(sparse.scorer, ExactScores) and threshold is not None:
            packed, by = replace(packed, norm=sparse.scorer.norm), "activation"
        elif rule in ("learned", "scored"):
            indices = self._picked(sparse, packed, cast(Tensor, x))
        return kernel.mlp(
            cast(Tensor, x), packed, indices=indices, rule=cast(Any, by), threshold=threshold or 0.0,
            dtype=torch.float32, form=self._form,
        )  # fmt: skip

    def _picked(self, sparse: SparseMLP, packed: PackedMLP, x: Tensor) -> Tensor:
        """int32 ``[tokens, k]``: the neurons that a predictor or a scorer chooses."""
        least, norm, kind = sparse.least, None, "plain"
        if sparse.predictor is not None:
            score = x
            for linear in sparse.predictor:
                matrix = FloatMatrix(linear.weight[:, : linear.in_features], linear.bias)
                score = kernel.linear(score, matrix, dtype=torch.float32, form=self._form)
        elif isinstance(sparse.scorer, ExactScores):
            parts = range(packed.weight.shape[1] - 1)
            biases = (packed.gate_bias, packed.up_bias) if packed.gated else (packed.up_bias,)
            rows = [FloatMatrix(packed.weight[:, part, : packed.hidden_size], biases[part]) for part in parts]
            score = cast(
                Tensor,
                kernel.activated(
                    x, rows, str(packed.act), gated=packed.gated, dtype=torch.float32, form=self._form
                ),
            )  # fmt: skip
            kind, norm = "size", sparse.scorer.norm
        elif isinstance(sparse.scorer, SignScores):
            score = kernel.sign_sums(x, sparse.scorer.signs)
            least = (least - 0.5) * 2 * packed.hidden_size
        else:
            score = cast(Any, sparse.scorer)(x).float()
        return kernel.pick(score, keep=sparse.keep, threshold=least, kind=cast(Any, kind), norm=norm)

    def _product(self, x: Inputs, matrices: tuple[Matrix, ...], columns: Any, names: tuple[str, ...]) -> Tensor:
        """What linears of these names make of x, side by side, some of them without small inputs."""
        left_out: dict[str, SparseLinear] = {name: columns[name] for name in names if name in columns}
        if not left_out:
            return kernel.linears(x, matrices, dtype=torch.float32, form=self._form)
        if len(left_out) == len(names):
            return self._columns(cast(Tensor, x), list(left_out.values()))
        if len(matrices) != len(names):
            raise NotCovered("inputs are left out of a part of a projection")
        parts = []
        for matrix, name in zip(matrices, names, strict=True):
            found = left_out.get(name)
            if found is None:
                parts.append(kernel.linear(x, matrix, dtype=torch.float32, form=self._form))
            else:
                parts.append(self._columns(cast(Tensor, x), [found]))
        return torch.cat(parts, 1)

    def _columns(self, x: Tensor, linears: list[SparseLinear], act: str | None = None) -> Tensor:
        """Linears without small inputs, side by side, in one launch; or what an activation makes of them."""
        return kernel.columns(
            x, [found.packed for found in linears], [found.threshold for found in linears],
            by_norm=linears[0].by_norm, act=act, dtype=self._model.spec.dtype if act else torch.float32,
            counters=self._counters,
        )  # fmt: skip


def _grouped(matrix: Matrix) -> bool:
    return isinstance(matrix, GroupedMatrix)


def _has_kernel(sparse: SparseMLP) -> bool:
    """Whether the one-pass kernels do what it says."""
    packed = sparse.packed
    if not isinstance(packed, PackedMLP) or packed.act not in tuple(ACTS):
        return False
    if sparse.rule == "sketch":
        return packed.low is not None
    if packed.scale is not None or sparse.smooth is not None or sparse.refine:
        return False
    if sparse.rule == "gate":
        return packed.gated and sparse.threshold is not None
    return sparse.predictor is None or all(linear.fmt is None for linear in sparse.predictor)


class Host(Protocol):
    """A wrapped model, as its lowering needs it."""

    model: nn.Module
    anatomy: Anatomy
    program: Program
    exact: Any
    lookup: Any


class GpuLowering:
    """The lowered steps of one wrapped model, which is described when a step is first asked for."""

    def __init__(self, host: Host, packing: GpuPacking) -> None:
        self._host, self._packing = host, packing
        self.forget()

    def forget(self) -> None:
        """The model was changed: it is described anew."""
        self._refusal: str | None = None
        self._spec: ModelSpec | None = None
        self._models: dict[bool, GpuModel] = {}
        self._known: WeakKeyDictionary[StepProgram, tuple[str | None, Hashable]] = WeakKeyDictionary()

    @property
    def refusal(self) -> str | None:
        """Why no step is lowered as a whole, if none is."""
        return self._refusal

    @property
    def ready(self) -> bool:
        return self._refusal is None and bool(self._models)

    @property
    def spec(self) -> ModelSpec:
        """Of a model whose steps are lowered."""
        assert self._spec is not None
        return self._spec

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has embeddings of."""
        return int(self.spec.embedding.shape[0])

    def prepare(self, program: StepProgram) -> str | None:
        """Packs the matrices that steps read under a program; why there are no such steps, if so."""
        return self.covers(program)

    def refuse(self, reason: str) -> None:
        """The model's steps are not lowered until it changes."""
        self._models.clear()
        self._refusal = reason
        kind = self._host.anatomy.model_type
        logger.debug("decode steps of this %s are not lowered as a whole, its modules are captured: %s", kind, reason)

    def covers(self, program: StepProgram | str) -> str | None:
        """Why there is no lowered step for a program; None where there is."""
        if isinstance(program, str):
            return program
        if self._refusal is None:
            try:
                self._model(program)
            except (NotCovered, ValueError, TypeError, RuntimeError) as reason:
                self.refuse(str(reason).partition("\n")[0])
        if self._refusal is not None:
            return self._refusal
        if program not in self._known:
            found = self._uncovered(program)
            if found is not None:
                logger.debug("steps under this plan are not lowered as a whole, modules are captured: %s", found)
            self._known[program] = found, _key(program)
        return self._known[program][0]

    def key(self, program: StepProgram) -> Hashable:
        """What of a program a graph has fixed: all but which neurons are listed."""
        return self._known[program][1]

    def step(self, program: StepProgram, place: Place, tokens: int) -> GpuStep:
        form: kernel.Form | None = "many" if self._host.exact or self._host.lookup else None
        return GpuStep(self._model(program), program, self._skipped(program), place, tokens, form)

    def positions(self, named: dict[str, Any], past: int) -> Tensor | None:
        """int64 ``[rows, tokens]``: the positions of a call's tokens; None: those in the cache.

        Raises:
            NotThisCall: the model cannot come to so many.
        """
        spec = cast(ModelSpec, self._spec)
        length, places, given = named["input_ids"].shape[1], spec.places, named.get("position_ids")
        if spec.end is not None and past + length > spec.end:
            raise NotThisCall(f"the model knows {spec.end} positions")
        if places is None or (places.given and given is not None):
            return cast("Tensor | None", given)
        mask = named.get("attention_mask")
        if not places.by_mask or mask is None:
            return None
        return cast(Tensor, (mask.long().cumsum(1) - 1).clamp_min(0)[:, -length:])

    def _model(self, program: StepProgram) -> GpuModel:
        as_loaded = program.as_loaded or self._packing.weights is None
        if as_loaded not in self._models:
            if self._spec is None:
                self._spec = describe(self._host.model, self._host.anatomy)
            packing = GpuPacking(None) if as_loaded else self._packing
            self._models[as_loaded] = lower(self._spec, packing)
        return self._models[as_loaded]

    def _uncovered(self, program: StepProgram) -> str | None:
        model = self._model(program)
        for index in program.experts:
            if self._host.program.chosen_experts[index].least is not None:
                return "neurons of experts are left out"
        if any(mlp is not None and isinstance(model.layers[i].mlp, GpuExperts) for i, mlp in enumerate(program.mlps)):
            return "neurons of a shared expert are left out"
        if any(mlp is not None and mlp.lists is not None and mlp.lists.rows is not None for mlp in program.mlps):
            return "its sequences chose differently"
        for index, columns in program.columns.items():
            attention, mlp = model.layers[index].attention, model.layers[index].mlp
            if isinstance(attention, GpuLatent) and columns.keys() & set(_ATTENTION):
                return "inputs are left out of projections of latents"
            products = [(_ATTENTION, attention.inputs), (("o",), (attention.output,))]
            if isinstance(mlp, GpuMLP):
                products += [(_MLP if mlp.gated else ("up",), mlp.widening), (("down",), (mlp.down,))]
            elif columns.keys() & {*_MLP, "down"}:
                return "inputs of a shared expert are left out"
            for names, matrices in products:
                some = columns.keys() & set(names)
                if some and len(some) < len(names) != len(matrices):
                    return "inputs are left out of a part of a projection"
        return None

    def _skipped(self, program: StepProgram) -> float:
        """Neurons that a token leaves out: what rules keep is taken from the calibration text."""
        skipped = float(program.skipped)
        for index, layer in enumerate(self._host.program.layers):
            mlp, experts = program.mlps[index], self._host.program.chosen_experts.get(index)
            if experts is not None and index not in program.no_mlp:
                skipped += (experts.top_k - experts.active) * experts.width
            for brick in layer.bricks if index not in program.no_mlp else ():
                if mlp is not None and mlp.rule != "listed":
                    skipped += brick.width - brick.kept
                for found in program.columns.get(index, {}).values():
                    inputs = found.packed.in_features
                    skipped += (1.0 - brick.share) * inputs * found.neurons
        return skipped


def _bundles(program: StepProgram) -> list[SparseMLP | None]:
    assert not any(isinstance(mlp, SlimMLP) for mlp in program.mlps), "smaller matrices are a CPU's"
    return cast("list[SparseMLP | None]", program.mlps)


def _key(program: StepProgram) -> Hashable:
    mlps = tuple(
        mlp
        and (
            None if isinstance(mlp, SlicedMLP) else id(mlp.packed),
            mlp.rule,
            mlp.threshold,
            mlp.keep,
            mlp.refine,
            id(mlp.scorer),
            id(mlp.predictor),
            mlp.lists and mlp.lists.kept,
        )
        for mlp in _bundles(program)
    )
    columns = tuple(
        (index, name, id(found.packed.weight), found.threshold)
        for index, every in program.columns.items()
        for name, found in every.items()
    )
    experts = tuple((index, kept is None, least) for index, (kept, least) in program.experts.items())
    return program.no_attention, program.no_mlp, program.as_loaded, mlps, columns, experts
