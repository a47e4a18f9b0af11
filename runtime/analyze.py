"""`analyze`: observe a model on text and make a plan."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..predictors.anatomy import check_model, dissect
from ..predictors.calibration import TokenText, text_of
from ..predictors.checks import Allocation, ExpertScore, Score
from ..predictors.errors import CoreskipError
from ..predictors.expert_policies import KeptExperts, SkipExperts
from ..predictors.expert_scores import check_experts
from ..predictors.layer_selection import LayerSelection
from ..predictors.layers import with_skipped_layers
from ..predictors.plan import Plan, default_weights
from .calibrate import Study
from .calibration_text import model_text
from .options import OF_EXPERTS, Budget, check_options, chooses_layers_alone, given
from .program import build_experts, normed
from .quality import WINDOW, evaluate_all
from .search import Journal, search
from .unknown import refuses_unknown
from .wrap import make_way

DEFAULT_KEEP = 0.6
_DEFAULT_KEEPS = {"layers": 0.9, "experts": 0.75, "skip-experts": 0.75}
_TOKENS_OF_LAYERS = 8192  # sampled, where layers alone are chosen
_WINDOWS_OF_LAYERS = 8


@refuses_unknown
def analyze(
    model: Any,
    tokenizer: Any,
    *,
    method: str = "auto",
    keep: float | None = None,
    budget: str | None = None,
    layers: str | None = None,
    weights: str | None = None,
    text: str | os.PathLike[str] | TokenText | None = None,
    score: Score | ExpertScore | None = None,
    beta: float | None = None,
    alpha: float | None = None,
    first_layer: int | None = None,
    rule: str | None = None,
    all_linears: bool | None = None,
    allocation: Allocation | None = None,
    bits: int | None = None,
    refine: bool | None = None,
    rank: int | None = None,
    tokens: int = 16384,
    windows: int | None = None,
    seed: int = 0,
    fast: bool = False,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Plan:
    """Make a Plan for `model`.

    An option that belongs to other methods is refused; None stands for its default.

    Args:
        model, tokenizer: from `load`, or any causal LM and its tokenizer; the model must not be wrapped.
        method: by prompt: ``core`` (stability-guided core neurons), ``similar`` (similarity-guided: the set of the
            nearest cluster of calibration sentences); by token: ``sketch`` (the high nibbles of the weights choose, of
            int4 their upper three bits), ``threshold`` (TEAL, WINA, CATS), ``learned`` (low-rank predictors), ``topk``
            (exact scores: the oracle, which saves down rows alone); ``static`` (one fixed set); ``layers`` (whole
            layers are left out; with a budget also attentions or MLPs alone); of mixtures of experts ``experts`` (some
            are left out for good) and ``skip-experts`` (those of a token whose weight is small beside its largest); or
            ``auto``: with a budget the search looks at all that save time, else it is ``sketch``.
        keep: share of the MLP neurons to keep, of ``layers`` that of the layers, of ``experts`` that of the experts, of
            ``skip-experts`` that of what the router chose, in (0, 1]; where neither it nor a budget is given 0.6, of
            ``layers`` 0.9, of both methods of experts 0.75.
        budget: ``ppl+1%``, ``kl<0.05`` or ``agreement>0.95`` (or 95%): the fastest plan found that holds it on text
            that the search did not see, with a margin; see `search`. A plan that skips nothing where none does.
        layers: layers that are left out besides: ``skip:6``, ``skip-attention:6``, ``skip-mlp:6``, ``every:2`` or
            ``adaptive:0.8``, see `LayerSelection`. Without method, keep and budget no neurons are.
        weights: ``int4`` or ``int8``, in which decode steps read their weights; a search tries both where it is None,
            and where int4 loses too much, mixtures rounded with the text: the plan is then for the model that `pack`
            makes with it.
        text: calibration text, or the `Path` of a UTF-8 file; None samples some from the model itself. The last part
            is held out to measure on.
        score: how ``core``, ``similar`` and ``static`` rank neurons, see `token_contributions`; by default
            ``griffin``, which measured best on the embedded model (README); CoreInfer's own is ``signed``. How
            ``experts`` ranks experts: ``reap``, the default, by what they add; ``frequency``; ``random``.
        beta: of ``skip-experts``, in place of keep: one for all layers, in (0, 1].
        alpha: share of a token's neurons that count as its core, 0.4 by default (all scores but ``griffin``).
        first_layer: layers before it stay dense, by default none (CoreInfer leaves the first 4).
        rule, all_linears: of ``threshold``: ``teal`` (default), ``wina`` or ``cats``; whether the attention's linears
            leave out small inputs, too.
        allocation: of ``sketch`` and ``topk``: how the share is spread over the layers, see `TokenCalibration`; by
            default ``greedy``.
        bits: of ``sketch``: by default 3 with weights in int4, else 4; 1 for the signs (ReLU models).
        refine: of ``sketch``: whether a second threshold, on exact scores, drops some of what the sketch chose: more is
            left out at the same loss of quality, in more time.
        rank: of ``learned``, 64 by default; at most the model's hidden size.
        tokens: at most this many are observed.
        windows: held-out windows of 512 tokens per measurement: by default 12, with `layers` 8.
        seed: of sampling, clustering and training.
        fast: with a budget: fewer windows, tokens and candidates; about a third of the time.
        resume: with a budget: a file that keeps what was measured; a search that was stopped goes on from there.

    Returns:
        a Plan whose ``quality`` was measured on held-out text; with a budget, its ``frontier`` holds what was found.

    Raises:
        CoreskipError: before any work is done where an argument is wrong, or belongs to another method.
    """
    methods: dict[str, Any] = {
        "score": score,
        "beta": beta,
        "alpha": alpha,
        "rule": rule,
        "all_linears": all_linears,
        "allocation": allocation,
        "bits": bits,
        "refine": refine,
        "rank": rank,
    }
    common: dict[str, Any] = {
        "weights": weights,
        "tokens": tokens,
        "windows": windows,
        "first_layer": first_layer,
        "seed": seed,
        "fast": fast,
    }
    check_options(method=method, keep=keep, budget=budget, layers=layers, resume=resume, **common, **methods)
    check_model(model)
    _check_bricks(model, method, chooses_layers_alone(method, keep, budget) and layers is not None)
    if weights is None:
        common["weights"] = weights = default_weights(model)
    options = given({**methods, **common})
    if layers is None:
        return _analyzed(model, tokenizer, text, method, keep, budget, resume, {**options, "progress": progress})
    selection = LayerSelection.parse(layers)
    selection.check(len(dissect(model)))
    seen, held_out = _text_of(model, tokenizer, text, seed, progress).split(0.8, 0.2)
    if chooses_layers_alone(method, keep, budget):
        plan = replace(Plan.dense(model, weights), calibration=seen.fingerprint())
    else:
        # layers that are left out besides are measured on the model as it is, not packed
        every = {**options, "progress": progress}
        plan = _analyzed(model, tokenizer, seen, method, keep, budget, resume, every, rounds=False)
    make_way(model)
    plan = with_skipped_layers(plan, model, seen, selection)
    window = min(WINDOW, len(held_out.ids) // 2 * 2)
    return replace(
        plan,
        quality=evaluate_all(
            model, [plan], held_out, windows=windows or _WINDOWS_OF_LAYERS, window=window, progress=progress
        )[0],
    )


def _analyzed(
    model: Any,
    tokenizer: Any,
    text: Any,
    method: str,
    keep: float | None,
    budget: str | None,
    resume: str | Path | None,
    options: dict[str, Any],
    rounds: bool = True,
) -> Plan:
    journal = Journal(resume)  # whether it can be read and written shows before any work
    study = Study(model, tokenizer, text=text, **options)
    if budget is not None:
        return search(study, Budget.parse(budget), method, journal=journal, rounds=rounds)
    default = _DEFAULT_KEEPS.get(method, DEFAULT_KEEP)
    return study.measured(study.calibrator.make("sketch" if method == "auto" else method, keep or default))


def _check_bricks(model: Any, method: str, layers_alone: bool) -> None:
    """Raises CoreskipError where the model has not what the method chooses from."""
    make_way(model)
    anatomy = dissect(model)
    if method in OF_EXPERTS:
        check_experts(anatomy)
        policy = SkipExperts(0.5) if method == "skip-experts" else KeptExperts(torch.zeros(1, dtype=torch.int64))
        for experts in filter(None, anatomy.experts):
            build_experts(policy, experts)
    elif method != "layers" and not layers_alone:
        norms = [mlp.norm_name for mlp in anatomy.mlps if mlp.norm_name is not None]
        if norms and method != "threshold":
            raise CoreskipError(normed(anatomy))


def _text_of(model: Any, tokenizer: Any, text: Any, seed: int, progress: bool) -> TokenText:
    if text is not None:
        return text_of(tokenizer, text)
    return model_text(model, tokenizer, tokens=_TOKENS_OF_LAYERS, length=WINDOW, seed=seed, progress=progress)
