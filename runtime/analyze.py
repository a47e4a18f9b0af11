"""`analyze`: observe a model on text and make a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..predictors.anatomy import check_model, dissect
from ..predictors.calibration import TokenText, text_of
from ..predictors.checks import Allocation
from ..predictors.errors import CoreskipError
from ..predictors.expert_policies import ExpertPolicy, KeptExperts, SkipExperts, ThinExperts
from ..predictors.expert_scores import check_experts
from ..predictors.layer_selection import LayerSelection
from ..predictors.layers import with_skipped_layers
from ..predictors.plan import Plan, default_weights
from .calibrate import Study
from .calibration_text import model_text
from .families import Family, outline
from .memory import cap_of, capped_under, check_method, recipe_under
from .memory_size import bytes_of
from .options import OF_EXPERTS, Budget, check_options, chooses_layers_alone, given
from .program import normed
from .program_experts import build_experts
from .quality import WINDOW, evaluate_all
from .scoring import Text, check_different
from .search import Journal, search
from .unknown import refuses_unknown
from .wrap import make_way

DEFAULT_KEEP = 0.6
_DEFAULT_KEEPS = {"layers": 0.9, "experts": 0.75, "skip-experts": 0.75, "core-experts": 0.75, "thin-experts": 0.75}
CAPPED_METHOD = "static"  # under a cap on memory, where nothing else is asked for
_TOKENS_OF_LAYERS = 8192  # sampled, where layers alone are chosen
_WINDOWS_OF_LAYERS = 8
_LEAST_ELSEWHERE = 16  # tokens


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
    text: Text | None = None,
    keep_for: Text | Sequence[Text] | None = None,
    drop_for: Text | Sequence[Text] | None = None,
    score: str | None = None,
    beta: float | None = None,
    alpha: float | None = None,
    first_layer: int | None = None,
    rule: str | None = None,
    all_linears: bool | None = None,
    allocation: Allocation | None = None,
    bits: int | None = None,
    refine: bool | None = None,
    rank: int | None = None,
    bricks: int | None = None,
    cluster: str | None = None,
    router: str | None = None,
    tokens: int = 16384,
    windows: int | None = None,
    seed: int = 0,
    fast: bool = False,
    resume: str | Path | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Plan:
    """Make a Plan for `model`.

    An option that belongs to other methods is refused; None stands for its default.

    Args:
        model, tokenizer: from `load`, or any causal LM and its tokenizer; the model must not be wrapped.
        method: by prompt: ``core`` (stability-guided core neurons), ``similar`` (similarity-guided: the set of the
            nearest cluster of calibration sentences); by token: ``sketch`` (the high nibbles of the weights choose,
            of int4 their upper three bits), ``threshold`` (TEAL, WINA, CATS), ``learned`` (low-rank predictors),
            ``topk`` (exact scores: the oracle, which saves down rows alone), ``bricks`` (neurons in groups that a
            token takes as a whole); ``static`` (one fixed set); ``layers`` (whole layers are left out; with a
            budget also attentions or MLPs alone); of mixtures of experts ``experts`` (some are left out for good),
            ``core-experts`` (after each prompt those that it used least; a token computes as many as before, which
            spares memory under a cap, not time), ``skip-experts`` (those of a token whose weight is small beside its
            largest) and ``thin-experts`` (neurons of a token's experts whose gates are hardly open: by the modules
            alone, no faster); or ``auto``: with a budget the search looks at all that save time, else it is
            ``sketch``.
        keep: share of the MLP neurons to keep, of ``layers`` that of the layers, of ``experts`` and
            ``core-experts`` that of the experts, of ``skip-experts`` that of what the router chose, of
            ``thin-experts`` that of the neurons of a token's experts, in (0, 1]; where neither it nor a budget is
            given 0.6, of ``layers`` 0.9, of the methods of experts 0.75.
        budget: ``ppl+1%``, ``kl<0.05`` or ``agreement>0.95`` (or 95%): the fastest plan found that holds it on text
            that the search did not see, with a margin; see `search`. A plan that skips nothing where none does.
        layers: layers that are left out besides: ``skip:6``, ``skip-attention:6``, ``skip-mlp:6``, ``every:2`` or
            ``adaptive:0.8``, see `LayerSelection`. Without method, keep and budget no neurons are.
        weights: ``int4`` or ``int8``, in which decode steps read their weights; a search tries both where it is None,
            and where int4 loses too much, mixtures rounded with the text: the plan is then for the model that `pack`
            makes with it.
        text: calibration text, or the `Path` of a UTF-8 file; None samples some from the model itself. The last part
            is held out to measure on.
        keep_for: in place of `text`, the text or texts that the plan is for: calibrated on and measured on a part of
            all of them. `drop_for`: of what it may lose: what it costs there is measured, too, and stands in the plan's
            recipe as ``elsewhere``.
        score: how ``core``, ``similar`` and ``static`` rank neurons, see `token_contributions`; by default
            ``griffin``, which measured best on the embedded model (README); CoreInfer's own is ``signed``; ``static``
            also by ``wanda``, ``taylor``, ``hessian``, ``smooth_gradient``, ``snmf`` or ``bigram``, see `scores`. How
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
        bricks, cluster, router: of ``bricks``: how many there are in a layer, 64 by default; made of neurons that fire
            together, ``coactivation``, of sparse features, ``snmf``, or of alike ``weights``; chosen by a ``linear``
            map or by their ``centroids``.
        tokens: at most this many are observed.
        windows: held-out windows of 512 tokens per measurement: by default 12, with `layers` 8.
        seed: of sampling, clustering and training.
        fast: with a budget: fewer windows, tokens and candidates; about a third of the time.
        resume: with a budget: a file that keeps what was measured; a search that was stopped goes on from there.
        memory: what the model is to take at most when it runs, see `wrap`; of a packed model. A search then predicts
            from the bandwidths of memory and disk, both measured, and leaves out what such a cap does not allow. The
            analysis itself may take more. None: what `load` was told.

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
        "bricks": bricks,
        "cluster": cluster,
        "router": router,
    }
    common: dict[str, Any] = {
        "weights": weights,
        "tokens": tokens,
        "windows": windows,
        "first_layer": first_layer,
        "seed": seed,
        "fast": fast,
    }
    check_options(
        method=method, keep=keep, budget=budget, layers=layers, resume=resume, memory=memory, **common, **methods
    )
    check_model(model)
    _check_bricks(model, method, budget is not None, chooses_layers_alone(method, keep, budget) and layers is not None)
    text, elsewhere = _purpose(tokenizer, text, keep_for, drop_for)
    cap = cap_of(model) if memory is None else bytes_of(memory)
    if cap is not None:
        check_method(method)
        _check_fits(model, method, keep, budget, cap)
        common["memory"] = cap
    if weights is None:
        common["weights"] = weights = default_weights(model)
    options = given({**methods, **common})
    if layers is None:
        plan = _analyzed(model, tokenizer, text, method, keep, budget, resume, {**options, "progress": progress})
        return _within(cap, model, _beside(model, plan, elsewhere, windows, progress))
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
    windows = windows or _WINDOWS_OF_LAYERS
    quality = evaluate_all(model, [plan], held_out, windows=windows, window=window, progress=progress)[0]
    plan = _beside(model, replace(plan, quality=quality), elsewhere, windows, progress)
    return _within(cap, model, plan)


def _purpose(tokenizer: Any, text: Any, keep_for: Any, drop_for: Any) -> tuple[Any, TokenText | None]:
    """The text that a plan is made from, and the one that it may fail on."""
    if drop_for is not None and keep_for is None:
        raise CoreskipError("drop_for names what a plan may lose; say what it is for, too: keep_for=...")
    if keep_for is None:
        return text, None
    if text is not None:
        raise CoreskipError("give text or keep_for, not both: keep_for is the text that the plan is made from")
    wanted = _texts_of(tokenizer, "keep_for", keep_for)
    others = [] if drop_for is None else _texts_of(tokenizer, "drop_for", drop_for)
    named = {f"keep_for[{i}]": each for i, each in enumerate(wanted)}
    check_different(named | {f"drop_for[{i}]": each for i, each in enumerate(others)})
    elsewhere = TokenText.joined(others) if others else None
    if elsewhere is not None and len(elsewhere.ids) < _LEAST_ELSEWHERE:
        raise CoreskipError(
            f"drop_for has {len(elsewhere.ids)} tokens, at least {_LEAST_ELSEWHERE} are needed to measure on: give more"
        )
    return TokenText.joined(wanted), elsewhere


def _texts_of(tokenizer: Any, name: str, texts: Any) -> list[TokenText]:
    several = list(texts) if isinstance(texts, (list, tuple)) else [texts]
    if not several:
        raise CoreskipError(f"{name} is empty: give a text, or a list of texts")
    return [text_of(tokenizer, each) for each in several]


def _beside(model: Any, plan: Plan, elsewhere: TokenText | None, windows: int | None, progress: bool) -> Plan:
    """The plan, with what it costs on the text that it is not for."""
    if elsewhere is None or plan.rounding is not None:  # the latter is of a model that has to be packed first
        return plan
    window = min(WINDOW, len(elsewhere.ids) // 2 * 2)
    found = evaluate_all(model, [plan], elsewhere, windows=windows or 12, window=window, progress=progress)[0]
    return replace(plan, recipe={**plan.recipe, "elsewhere": found})


def _check_fits(model: Any, method: str, keep: float | None, budget: str | None, cap: int) -> None:
    """Raises CoreskipError where the model under a cap, or what a plan is asked to keep, does not fit."""
    anatomy, plan = dissect(model), Plan.dense(model)
    capped_under(model, plan, anatomy, cap)
    if budget is None and method != "layers":
        family = Family(CAPPED_METHOD if method == "auto" else method, {})
        kept = replace(plan, layers=outline(family, keep or DEFAULT_KEEP, anatomy), weights=default_weights(model))
        capped_under(model, kept, anatomy, cap)


def _within(cap: int | None, model: Any, plan: Plan) -> Plan:
    """The plan, with what stays in memory under a cap."""
    return plan if cap is None else replace(plan, recipe={**plan.recipe, **recipe_under(model, plan, cap)})


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
    usual = "sketch" if study.memory is None else CAPPED_METHOD
    return study.measured(study.calibrator.make(usual if method == "auto" else method, keep or default))


def _check_bricks(model: Any, method: str, searching: bool, layers_alone: bool) -> None:
    """Raises CoreskipError where the model has not what the method chooses from."""
    make_way(model)
    anatomy = dissect(model)
    if method == "auto" and searching and any(anatomy.experts):
        return  # the search looks at what there is
    if method in OF_EXPERTS:
        check_experts(anatomy)
        for experts in filter(None, anatomy.experts):
            some: dict[str, ExpertPolicy] = {
                "skip-experts": SkipExperts(0.5),
                "thin-experts": ThinExperts(torch.zeros(experts.count), 1.0),
            }
            build_experts(some.get(method, KeptExperts(torch.zeros(1, dtype=torch.int64))), experts)
    elif method != "layers" and not layers_alone:
        norms = [mlp.norm_name for mlp in anatomy.mlps if mlp.norm_name is not None]
        if norms and method != "threshold":
            raise CoreskipError(normed(anatomy))


def _text_of(model: Any, tokenizer: Any, text: Any, seed: int, progress: bool) -> TokenText:
    if text is not None:
        return text_of(tokenizer, text)
    return model_text(model, tokenizer, tokens=_TOKENS_OF_LAYERS, length=WINDOW, seed=seed, progress=progress)
