"""The options of `analyze`: their values, what they go with, and budgets. Without torch, so that the command line
refuses a mistake at once."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from ..predictors.checks import (
    AS_PACKED,
    EXPERT_SCORES,
    STATIC_SCORES,
    Allocation,
    BrickRouter,
    Clustering,
    ExpertScore,
    Score,
    check_allocation,
    check_count,
    check_flag,
    check_score,
    check_seed,
    check_share,
    check_weights,
    path_of,
)
from ..predictors.errors import CoreskipError
from ..predictors.layer_selection import LayerSelection, Leave
from .memory_size import bytes_of
from .unknown import closest

METHODS = (
    "auto", "core", "similar", "static", "threshold", "sketch", "learned", "topk", "bricks", "layers", "experts",
    "skip-experts", "core-experts", "thin-experts",
)  # fmt: skip
OF_EXPERTS = ("experts", "skip-experts", "core-experts", "thin-experts")  # of mixtures of experts
UNSEARCHED = ("experts", "core-experts", "thin-experts", "bricks")  # no search for a budget looks at them
RULES = ("teal", "wina", "cats")
WITH_ALPHA = ("magnitude", "magnitude_down", "signed")  # of the scores, those by which tokens have a core


@dataclass(frozen=True)
class MethodOptions:
    """What one method of `analyze` can be told; checked when it is made."""


@dataclass(frozen=True)
class ByPromptOptions(MethodOptions):
    """Of ``core`` and ``similar``.

    Attributes:
        score: how neurons are ranked.
        alpha: share of a token's neurons that count as its core, CoreInfer's (section 3); of the scores `WITH_ALPHA`.
    """

    score: Score = "griffin"
    alpha: float = 0.4

    def __post_init__(self) -> None:
        check_score(self.score)
        check_share("alpha", self.alpha)


@dataclass(frozen=True)
class CoreOptions(ByPromptOptions):
    """Of ``core``."""


@dataclass(frozen=True)
class SimilarOptions(ByPromptOptions):
    """Of ``similar``."""


@dataclass(frozen=True)
class StaticOptions(MethodOptions):
    """Of ``static``: as of ``core``, and more scores, see `scores`."""

    score: str = "griffin"
    alpha: float = 0.4

    def __post_init__(self) -> None:
        check_score(self.score, STATIC_SCORES)
        check_share("alpha", self.alpha)


@dataclass(frozen=True)
class ThresholdOptions(MethodOptions):
    """Of ``threshold``.

    Attributes:
        rule: ``teal``, ``wina`` or ``cats``.
        all_linears: whether the attention's linears leave out small inputs, too.
    """

    rule: str = "teal"
    all_linears: bool = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise CoreskipError(f"unknown rule {self.rule!r}; choose from {', '.join(RULES)}")
        check_flag("all_linears", self.all_linears)


@dataclass(frozen=True)
class AllocatedOptions(MethodOptions):
    """Of ``topk`` and ``sketch``.

    Attributes:
        allocation: how the share is spread over the layers.
    """

    allocation: Allocation = "greedy"

    def __post_init__(self) -> None:
        check_allocation(self.allocation)


@dataclass(frozen=True)
class TopKOptions(AllocatedOptions):
    """Of ``topk``.

    Attributes:
        gated: with weights in int4, whether gates choose of which neurons up rows are read. The search's own.
    """

    gated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("gated", self.gated)


@dataclass(frozen=True)
class SketchOptions(AllocatedOptions):
    """Of ``sketch``.

    Attributes:
        bits: of the weights that choose: 3 of weights in int4, 4 of others, or 1 for their signs; None: 3 or 4.
        refine: whether exact scores drop some of what the sketch chose; one of 3 bits always is.
    """

    bits: int | None = None
    refine: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (None, 1, 3, 4) or isinstance(self.bits, bool):
            raise CoreskipError(f"bits is {self.bits!r}: a sketch has 4 bits, 3 (of weights in int4) or 1 (signs)")
        check_flag("refine", self.refine)


@dataclass(frozen=True)
class LearnedOptions(MethodOptions):
    """Of ``learned``.

    Attributes:
        rank: of the predictors; at most the model's hidden size.
    """

    rank: int = 64

    def __post_init__(self) -> None:
        check_count("rank", self.rank)


@dataclass(frozen=True)
class LayersOptions(MethodOptions):
    """Of ``layers``.

    Attributes:
        leave: what is left out: whole ``layers``, or ``attentions`` or ``mlps`` of them. The search's own: `analyze`
            leaves out whole layers.
    """

    leave: Leave = "layers"

    def __post_init__(self) -> None:
        if self.leave not in get_args(Leave):
            raise CoreskipError(f"unknown leave {self.leave!r}; choose from {', '.join(get_args(Leave))}")


@dataclass(frozen=True)
class ExpertsOptions(MethodOptions):
    """Of ``experts``.

    Attributes:
        score: how experts are ranked: ``reap``, ``frequency`` or ``random``.
    """

    score: ExpertScore = "reap"

    def __post_init__(self) -> None:
        if self.score not in EXPERT_SCORES:
            raise CoreskipError(f"unknown score {self.score!r} of experts; choose from {', '.join(EXPERT_SCORES)}")


@dataclass(frozen=True)
class SkipExpertsOptions(MethodOptions):
    """Of ``skip-experts``.

    Attributes:
        beta: one for all layers, in place of those that keep the wanted share on the calibration text.
    """

    beta: float | None = None

    def __post_init__(self) -> None:
        if self.beta is not None:
            check_share("beta", self.beta)


@dataclass(frozen=True)
class BricksOptions(MethodOptions):
    """Of ``bricks``.

    Attributes:
        bricks: how many a layer's neurons are in.
        cluster: by what neurons go together: ``coactivation`` on the calibration text, the ``snmf`` features of its
            activations, or the gate's ``weights``.
        router: by what a token takes them: a ``linear`` map fitted to what bricks are worth, or their ``centroids``.
    """

    bricks: int = 64
    cluster: Clustering = "coactivation"
    router: BrickRouter = "linear"

    def __post_init__(self) -> None:
        check_count("bricks", self.bricks, 2)
        for name, known in (("cluster", get_args(Clustering)), ("router", get_args(BrickRouter))):
            if getattr(self, name) not in known:
                raise CoreskipError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(known)}")


OPTIONS_OF: Mapping[str, type[MethodOptions]] = {
    "core": CoreOptions,
    "similar": SimilarOptions,
    "static": StaticOptions,
    "threshold": ThresholdOptions,
    "sketch": SketchOptions,
    "learned": LearnedOptions,
    "bricks": BricksOptions,
    "topk": TopKOptions,
    "layers": LayersOptions,
    "experts": ExpertsOptions,
    "skip-experts": SkipExpertsOptions,
    "core-experts": MethodOptions,
    "thin-experts": MethodOptions,
    "dense": MethodOptions,
}
_OF_THE_SEARCH = ("leave", "gated")  # what a user cannot give


def _methods_of(name: str) -> tuple[str, ...]:
    return tuple(method for method, options in OPTIONS_OF.items() if name in {each.name for each in fields(options)})


#: By option that a user can give, the methods that have it. The others take no notice of it, which a user would not
#: learn from the plan.
OF_METHODS: Mapping[str, tuple[str, ...]] = {
    each.name: _methods_of(each.name)
    for options in OPTIONS_OF.values()
    for each in fields(options)
    if each.name not in _OF_THE_SEARCH
}


def options_of(method: str, values: Mapping[str, Any]) -> Any:
    """The options of `method`, with these values in place of the defaults.

    Raises:
        CoreskipError: the method has no such option, or not such a value.
    """
    known = {each.name for each in fields(OPTIONS_OF[method])}
    for name in values:
        if name not in known:
            raise CoreskipError(f"the method {method} has no option {name!r}: {closest(name, known)}")
    return OPTIONS_OF[method](**values)


def check_value(name: str, value: Any) -> None:
    """Raise `CoreskipError` where no method can be told this."""
    for method in reversed(OF_METHODS.get(name, ("layers",))):
        try:
            options_of(method, {name: value})
            return
        except CoreskipError as error:
            refusal = error
    raise refusal


#: What a search tries for itself, method by method.
_SEARCHED = {
    "rule": ("threshold",),
    "all_linears": ("threshold",),
    "allocation": ("sketch",),
    "beta": ("skip-experts",),
}
_ALL = frozenset(METHODS) - {"auto", *UNSEARCHED}
_FAST = frozenset(
    {"sketch", "threshold", "static", "skip-experts", "layers"}
)  # what a fast search over all methods looks at
_NUMBER = r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)"


@dataclass(frozen=True)
class Budget:
    """The quality a user will give up: one of ``ppl+1%``, ``kl<0.05``, ``agreement>0.95``."""

    text: str
    measure: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read what a user writes; case and spaces do not matter, and an agreement may be written in %.

        Raises:
            CoreskipError: not a budget, or one that no plan could hold or none could break.
        """
        if not isinstance(text, str):
            raise CoreskipError(f"the budget is {text!r}: write it as text: ppl+1%, kl<0.05 or agreement>0.95")
        for measure, pattern in (
            ("ppl", rf"ppl\+{_NUMBER}(%)"),
            ("kl", rf"kl<{_NUMBER}()"),
            ("agreement", rf"agreement>{_NUMBER}(%?)"),
        ):
            match = re.fullmatch(pattern, re.sub(r"\s", "", text).lower())
            if match:
                limit = float(match[1]) * (0.01 if match[2] else 1.0)
                _check_limit(text, measure, limit)
                return cls(text, measure, limit)
        raise CoreskipError(f"cannot read the budget {text!r}; write ppl+1%, kl<0.05 or agreement>0.95")

    def holds(self, quality: dict[str, Any]) -> bool:
        """Whether a measurement is within the budget; perplexity with one standard error to spare: by five to one
        it then holds on other text of the kind."""
        return self.loss(quality, 1.0) <= self.limit_of_loss

    def exceeds(self, quality: dict[str, Any], times: float = 1.0) -> bool:
        """Whether a measurement is beyond so many times the budget, perplexity beyond doubt."""
        return self.loss(quality, -1.0) > times * self.limit_of_loss

    def undecided(self, quality: dict[str, Any]) -> bool:
        """Whether a measurement is within the budget, but for the spare."""
        return self.loss(quality, 0.0) <= self.limit_of_loss < self.loss(quality, 1.0)

    @property
    def limit_of_loss(self) -> float:
        return 1 - self.limit if self.measure == "agreement" else self.limit

    def loss(self, quality: dict[str, Any], spare: float) -> float:
        """What is limited, the more the worse; of perplexity with so many standard errors added."""
        if self.measure == "ppl":
            return float(quality["ppl_increase"] + spare * (quality["ppl_increase_stderr"] or 0.0))
        return float(quality["kl"] if self.measure == "kl" else 1 - quality["top1_agreement"])


def _check_limit(text: str, measure: str, limit: float) -> None:
    if measure == "agreement" and not 0 < limit < 1:
        raise CoreskipError(f"the budget {text!r} asks for an agreement that is not between 0 and 1: write 0.95 or 95%")
    if measure != "agreement" and not limit > 0:
        raise CoreskipError(f"the budget {text!r} allows no loss at all: write a limit above 0, as in kl<0.05")
    if math.isinf(limit):
        raise CoreskipError(f"the budget {text!r} allows any loss: write a limit, as in kl<0.05")


def given(options: dict[str, Any]) -> dict[str, Any]:
    """What a user has given: the rest is left to the defaults."""
    return {name: value for name, value in options.items() if value is not None}


def check_options(
    *,
    method: str = "auto",
    keep: float | None = None,
    budget: str | None = None,
    layers: str | None = None,
    weights: str | None = None,
    tokens: int = 16384,
    windows: int | None = None,
    first_layer: int | None = None,
    seed: int = 0,
    fast: bool = False,
    resume: Any = None,
    memory: Any = None,
    **options: Any,
) -> None:
    """Raise `CoreskipError` for what `analyze` would refuse, before a model is loaded.

    Args:
        options: those of `OF_METHODS`; None where one was not given.
    """
    if method not in METHODS:
        raise CoreskipError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    _check_values(method, tokens=tokens, windows=windows, first_layer=first_layer, seed=seed, fast=fast, **options)
    check_weights(weights)
    if memory is not None:
        bytes_of(memory)
    if keep is not None and budget is not None:
        raise CoreskipError("give keep or budget, not both: a budget finds the keep itself")
    if keep is not None:
        check_share("keep", keep)
    if budget is not None:
        Budget.parse(budget)
    if resume is not None:
        path_of(resume, "the file of measurements")
    if budget is None and (fast or resume is not None):
        raise CoreskipError(f"{'fast' if fast else 'resume'} is of the search for a budget: add one, such as ppl+1%")
    if layers is not None:
        LayerSelection.parse(layers)
        if method == "layers":
            raise CoreskipError(
                "--layers says which layers to leave out, --method layers looks for them: give one of them"
            )
    named = {name: value for name, value in options.items() if value is not None and value is not False}
    if layers is not None and chooses_layers_alone(method, keep, budget):
        _refuse_any([*named, *(["first_layer"] if first_layer is not None else [])])
    _check_places(named, method, searching=budget is not None, fast=fast)
    _check_pairs(named)
    if method in UNSEARCHED and budget is not None:
        raise CoreskipError(f"there is no search for a budget with the method {method}: give a keep, and measure")
    if keep is not None and "beta" in named:
        raise CoreskipError("give keep or beta, not both: a beta keeps what it keeps")
    check_bits(named.get("bits"), in_four_bits=weights in ("int4", AS_PACKED))


def chooses_layers_alone(method: str, keep: float | None, budget: str | None) -> bool:
    """Whether `analyze` with ``layers`` leaves no neurons out: nothing was said of them."""
    return method == "auto" and keep is None and budget is None


def _check_places(named: Mapping[str, Any], method: str, *, searching: bool, fast: bool) -> None:
    """Raise where a given option belongs to none of the methods that will be looked at."""
    shown = method
    looked_at: Collection[str] = {method}
    if method == "auto":
        looked_at = {"sketch"} if not searching else _FAST if fast else _ALL
        shown += " (a sketch)" if not searching else " (a fast search)" if fast else ""
    for name in named:
        if not set(looked_at) & set(OF_METHODS[name]):
            methods = ", ".join(OF_METHODS[name])
            raise CoreskipError(f"{name} is of the method {methods}, and the method is {shown}: leave it out")
        if searching and method in ("auto", *_SEARCHED.get(name, ())) and name in _SEARCHED:
            raise CoreskipError(f"a search for a budget tries every {name} itself: leave it out, or give a keep")


def check_bits(bits: int | None, *, in_four_bits: bool) -> None:
    """Raise where a sketch of 3 bits has no 4-bit weights to be of."""
    if bits == 3 and not in_four_bits:
        raise CoreskipError("a sketch of 3 bits is of weights in 4 bits: add weights int4, or give bits 4")


def _check_pairs(named: Mapping[str, Any]) -> None:
    """Raise where an option makes another one meaningless."""
    if "alpha" in named and named.get("score") not in WITH_ALPHA:
        raise CoreskipError("alpha is of the scores magnitude, magnitude_down and signed: add one of them")
    if named.get("bits") == 1 and "allocation" in named:
        raise CoreskipError("a sketch of signs keeps the same share of every layer: leave out allocation, or bits")
    if named.get("bits") == 1 and "refine" in named:
        raise CoreskipError("a sketch of signs cannot be refined: give bits 4")


def _refuse_any(names: Collection[str]) -> None:
    for name in names:
        raise CoreskipError(f"{name} is of choosing neurons, and layers alone are left out: add a method or a keep")


def _check_values(
    method: str, *, tokens: Any, windows: Any, first_layer: Any, seed: Any, fast: Any, **options: Any
) -> None:
    for name in options:
        if name not in OF_METHODS:
            known = {*OF_METHODS, "method", "keep", "budget", "layers", "weights", "tokens", "windows", "first_layer"}
            hint = closest(name, known | {"seed", "fast", "resume", "text", "progress"})
            raise CoreskipError(
                f"there is no option {name!r}: {hint if 'did' in hint else 'see help(coreskip.analyze)'}"
            )
    check_count("tokens", tokens)
    if windows is not None:
        check_count("windows", windows)
    check_seed(seed)
    check_flag("fast", fast)
    if first_layer is not None:
        check_count("first_layer", first_layer, 0)
    for name, value in given(options).items():
        if method in OF_METHODS[name]:
            options_of(method, {name: value})
        else:
            check_value(name, value)
