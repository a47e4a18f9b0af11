"""The options of `analyze`: their values, what they go with, and budgets. Without torch, so that the command line
refuses a mistake at once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..predictors.checks import check_allocation, check_count, check_flag, check_score, check_seed, check_share, path_of
from ..predictors.errors import CoreskipError

METHODS = ("auto", "core", "similar", "static", "threshold", "sketch", "learned", "topk", "layers")
RULES = ("teal", "wina", "cats")
#: What belongs to some methods only. The others take no notice of it, which a user would not learn from the plan.
OF_METHODS: Mapping[str, tuple[str, ...]] = {
    "score": ("core", "similar", "static"),
    "alpha": ("core", "similar", "static"),
    "rule": ("threshold",),
    "all_linears": ("threshold",),
    "allocation": ("sketch", "topk"),
    "bits": ("sketch",),
    "refine": ("sketch",),
    "rank": ("learned",),
}
#: What a search tries for itself, method by method.
_SEARCHED = {"rule": ("threshold",), "all_linears": ("threshold",), "allocation": ("sketch",)}
_ALL = frozenset(METHODS) - {"auto"}
_FAST = frozenset({"sketch", "threshold", "static", "layers"})  # what a fast search over all methods looks at
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
    tokens: int = 16384,
    windows: int = 12,
    first_layer: int | None = None,
    seed: int = 0,
    fast: bool = False,
    resume: Any = None,
    dense: bool = False,
    **options: Any,
) -> None:
    """Raise `CoreskipError` for what `analyze` would refuse, before a model is loaded.

    Args:
        dense: no neurons are to be chosen: layers alone, which are named, are left out.
        options: those of `OF_METHODS`; None where one was not given.
    """
    _check_values(tokens=tokens, windows=windows, first_layer=first_layer, seed=seed, fast=fast, **options)
    if method not in METHODS:
        raise CoreskipError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
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
    named = {name: value for name, value in options.items() if value is not None and value is not False}
    if dense:
        _refuse_any([*named, *(["first_layer"] if first_layer is not None else [])])
    _check_places(named, method, searching=budget is not None, fast=fast)
    _check_pairs(named)


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


def _check_pairs(named: Mapping[str, Any]) -> None:
    """Raise where an option makes another one meaningless."""
    if "alpha" in named and named.get("score", "griffin") == "griffin":
        raise CoreskipError("alpha is of the scores magnitude, magnitude_down and signed: add one of them")
    if named.get("bits") == 1 and "allocation" in named:
        raise CoreskipError("a sketch of signs keeps the same share of every layer: leave out allocation, or bits")
    if named.get("bits") == 1 and "refine" in named:
        raise CoreskipError("a sketch of signs cannot be refined: give bits 4")


def _refuse_any(names: Collection[str]) -> None:
    for name in names:
        raise CoreskipError(f"{name} is of choosing neurons, and layers alone are left out: add a method or a keep")


def _check_values(*, tokens: Any, windows: Any, first_layer: Any, seed: Any, fast: Any, **options: Any) -> None:
    unknown = [name for name in options if name not in OF_METHODS]
    if unknown:
        raise CoreskipError(f"there is no option {unknown[0]!r}: see help(coreskip.analyze)")
    check_count("tokens", tokens)
    check_count("windows", windows)
    check_seed(seed)
    check_flag("fast", fast)
    if first_layer is not None:
        check_count("first_layer", first_layer, 0)
    checks: dict[str, Callable[[Any], None]] = {
        "score": check_score,
        "alpha": lambda value: check_share("alpha", value),
        "rule": _check_rule,
        "allocation": check_allocation,
        "bits": _check_bits,
        "rank": lambda value: check_count("rank", value),
        "refine": lambda value: check_flag("refine", value),
        "all_linears": lambda value: check_flag("all_linears", value),
    }
    for name, value in given(options).items():
        checks[name](value)


def _check_rule(rule: Any) -> None:
    if rule not in RULES:
        raise CoreskipError(f"unknown rule {rule!r}; choose from {', '.join(RULES)}")


def _check_bits(bits: Any) -> None:
    if bits not in (1, 4) or isinstance(bits, bool):
        raise CoreskipError(f"bits is {bits!r}: a sketch has 4 bits, or 1 (signs)")
