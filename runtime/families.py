"""The families that a budget search looks at: ways of choosing neurons, experts or layers, each in one weight
format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch

from ..predictors.anatomy import Anatomy, Experts
from ..predictors.expert_policies import AllExperts, ExpertPolicy, SkipExperts
from ..predictors.four_bits import Form
from ..predictors.layer_selection import Leave
from ..predictors.layers import skip_policies, skipped_layers
from ..predictors.learned import RANK
from ..predictors.plan import LayerPlan
from ..predictors.policies import Cats, CoreNeurons, Learned, NeuronPolicy, Sketch, Teal, TopK, Wina
from .options import CoreOptions

_KEEPS = tuple(round(0.05 * i, 2) for i in range(19, 1, -1))  # 0.95 ... 0.1
_FINE = 0.02


@dataclass(frozen=True)
class Family:
    """One way of choosing neurons, experts or layers, with the weights as loaded or in a format of their own."""

    method: str
    options: Mapping[str, Any]
    weights: str | None = None

    @property
    def label(self) -> str:
        method = "skip" if self.method == "layers" else self.method
        flags = ("all_linears", "gated")
        words = [method, *(str(v) for k, v in self.options.items() if v and k not in flags)]
        words += ["gates"] if self.options.get("gated") else []
        words += ["all linears"] if self.options.get("all_linears") else []
        return " ".join(words + ([self.weights] if self.weights else []))

    @property
    def group(self) -> tuple[Any, ...]:
        """What families have in common that differ in weights or allocation alone: they are pruned together."""
        return self.method, self.options.get("rule"), self.options.get("all_linears"), self.options.get("leave")

    @property
    def of_experts(self) -> bool:
        return self.method == "skip-experts"

    @property
    def form(self) -> Form | None:
        """How it leaves neurons out of 4-bit weights token by token, if it does."""
        if self.method == "topk":
            return Form.GATES if self.options.get("gated") else Form.ROWS
        return Form.PLANES if self.method == "sketch" and self.weights == "int4" else None

    @property
    def formats(self) -> tuple[str | None, ...]:
        """In which weights the native step runs it, the fewest bytes first; as loaded alone where it does not."""
        if self.method == "topk":  # elsewhere it leaves hardly anything unread
            return ("int4",)
        native = self.method in ("dense", "sketch", "static", "core", "similar", "layers", "skip-experts")
        return ("int4", "int8", None) if native or self.options.get("rule") == "cats" else (None,)

    def keeps(self, depth: int) -> tuple[float, ...]:
        """The shares that are tried in a model of so many layers, the most first."""
        if self.method == "layers":
            return tuple(round(1 - left / depth, 4) for left in range(1, -(-9 * depth // 10)))
        return (1.0,) if self.method == "dense" else _KEEPS

    def keeping_more(self, keep: float, depth: int) -> float | None:
        """A share that keeps about a quarter more of what `keep` leaves out; None where that is all of it."""
        if self.method == "layers":
            left = skipped_layers(keep, depth)
            more = round(1 - (left - max(1, left // 4)) / depth, 4)
        else:
            more = round(keep + max(_FINE, 0.25 * (1 - keep)), 2)
        return more if more < 1 else None


#: Most promising first, as measured on the embedded model.
FAMILIES = (
    Family("topk", {"allocation": "greedy", "gated": True}),
    Family("topk", {"allocation": "equal"}),
    Family("sketch", {"allocation": "greedy"}),
    Family("sketch", {"allocation": "fisher"}),
    Family("sketch", {"allocation": "residual"}),
    Family("sketch", {"allocation": "equal"}),
    Family("threshold", {"rule": "cats", "all_linears": False}),
    Family("threshold", {"rule": "wina", "all_linears": False}),
    Family("threshold", {"rule": "teal", "all_linears": False}),
    Family("threshold", {"rule": "teal", "all_linears": True}),
    Family("sketch", {"allocation": "cett"}),
    Family("learned", {}),
    Family("static", {}),
    Family("core", {}),
    Family("similar", {}),
    Family("skip-experts", {}),
    *(Family("layers", {"leave": leave}) for leave in get_args(Leave)),
)
_OF_NEURONS = "topk greedy gates", "topk equal", "sketch greedy", "threshold cats", "threshold teal", "static"
_LABELS = (*_OF_NEURONS, "skip-experts")
FAST = tuple(f for f in FAMILIES if f.method == "layers" or f.label in _LABELS)
DENSE = Family("dense", {})
ROUNDED = Family("rounded", {})  # its "keep" is the share of the bytes that all linears take in 8 bits
#: By method, the family that is cheapest to calibrate: where it is far off the budget, so are the method's others.
PROXIES = {"sketch": Family("sketch", {"allocation": "equal"})}


def outline(family: Family, keep: float, anatomy: Anatomy) -> tuple[LayerPlan, ...]:
    """Policies that move the bytes of the family's at this keep, without its calibration."""
    depth = len(anatomy)
    if family.method == "layers":
        policies = skip_policies(family.options["leave"], range(skipped_layers(keep, depth)), depth)
        return tuple(LayerPlan(layer=policy) for policy in policies)
    if family.method == "skip-experts":
        return tuple(LayerPlan(experts=_fewer(keep, experts)) for experts in anatomy.experts)
    return tuple(LayerPlan(_neurons(family, keep, anatomy, index)) for index in range(depth))


def _fewer(keep: float, experts: Experts | None) -> ExpertPolicy:
    return AllExperts() if experts is None else SkipExperts(beta=1.0, share=keep)


def _neurons(family: Family, keep: float, anatomy: Anatomy, layer: int) -> NeuronPolicy:
    mlp, attention = anatomy.mlp(layer), anatomy.attentions[layer]
    if family.form is not None:
        return _in_four_bits(family.form, keep, mlp.intermediate_size)
    if family.method == "sketch":
        return Sketch(keep=keep, bits=family.options.get("bits", 4))
    if family.method == "learned":
        width, zeros = mlp.intermediate_size, torch.zeros
        return Learned(keep=keep, reduce=zeros(RANK, mlp.hidden_size), expand=zeros(width, RANK), bias=zeros(width))
    if family.method != "threshold":
        return CoreNeurons(CoreOptions().alpha, keep, "griffin")
    rule = family.options["rule"]
    if rule == "cats":
        return Cats(keep, 0.0)
    thresholds = {f"mlp.{mlp.down_name}": 0.0}
    if family.options.get("all_linears") and attention is not None:
        thresholds |= {f"attention.{name}": 0.0 for name in (*attention.inputs, attention.output)}
    return (Teal if rule == "teal" else Wina)(keep, thresholds)


def _in_four_bits(form: Form, keep: float, width: int) -> NeuronPolicy:
    """With as many candidates as calibrations chose on the embedded model."""
    if form is Form.PLANES:
        return Sketch(bits=3, keep=keep, threshold=0.0, refine=0.0, candidates=min(1.0, keep + 0.08))
    if form is Form.ROWS:
        return TopK(keep=keep, threshold=0.0)
    reach = torch.zeros(width, dtype=torch.float32, device="cpu")
    return TopK(keep=keep, threshold=0.0, gate=0.0, reach=reach, candidates=min(1.0, keep + 0.19))
