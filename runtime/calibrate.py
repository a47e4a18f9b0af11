"""Calibration: a model is observed on text, plans are made of what was seen, and measured on text held out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from ..predictors.anatomy import Anatomy, dissect
from ..predictors.bricks import make_bricks
from ..predictors.calibration import TokenText, most_positions, text_of
from ..predictors.checks import AS_PACKED, SCORES, Score
from ..predictors.core_neurons import SentenceCounter, cluster_sentences, static_set
from ..predictors.errors import CoreskipError
from ..predictors.expert_policies import AllExperts, CoreExperts, ExpertPolicy
from ..predictors.expert_scores import ExpertStats, kept_experts, observe_experts, skipped_experts, thin_experts
from ..predictors.fingerprint import Fingerprint
from ..predictors.four_bits import Form
from ..predictors.importance import kept_count
from ..predictors.layer_selection import Leave
from ..predictors.layers import block_influence, half_losses, skip_policies, skipped_layers
from ..predictors.observe import LayerStats, down_norms, observe
from ..predictors.plan import PACKED_AS, LayerPlan, Plan
from ..predictors.policies import Clusters, CoreNeurons, NeuronPolicy, Similar, Static
from ..predictors.scores import NeuronScores
from ..predictors.token_choice import TokenCalibration
from .calibration_text import model_text
from .cost import runs_natively
from .emulation import Emulation
from .gpu_matrices import check_any_format
from .lower_cpu import refusal
from .options import (
    OPTIONS_OF,
    WITH_ALPHA,
    BricksOptions,
    ByPromptOptions,
    CoreOptions,
    ExpertsOptions,
    LayersOptions,
    LearnedOptions,
    MethodOptions,
    SimilarOptions,
    SketchOptions,
    SkipExpertsOptions,
    StaticOptions,
    ThresholdOptions,
    TopKOptions,
    check_bits,
    check_value,
    options_of,
)
from .quality import WINDOW, evaluate_all
from .scoring import scored, source_of
from .wrap import make_way

Scored = StaticOptions | ByPromptOptions  # methods that rank neurons by a score
_PER_WINDOW = 2048  # tokens observed, to one window that tells what layers are worth
_SENTENCE = 256  # tokens; CoreInfer finds core neurons stable from 200-300 tokens on


class Study:
    """A model, the calibrator that observes one part of a text, and two more parts to measure plans on: one chooses
    between candidates, one is measured on at the end.

    Args:
        the arguments: as in `analyze`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        text: str | os.PathLike[str] | TokenText | None = None,
        weights: str | None = None,
        tokens: int = 16384,
        windows: int = 12,
        first_layer: int = 0,
        seed: int = 0,
        fast: bool = False,
        progress: bool = True,
        memory: int | None = None,
        **options: Any,
    ) -> None:
        make_way(model)
        self.memory = memory
        self._anatomy = dissect(model)
        depth = len(self._anatomy)
        if first_layer >= depth:
            raise CoreskipError(f"first_layer is {first_layer}; the model has layers 0..{depth - 1}")
        _check_rank(options.get("rank"), self._anatomy.hidden_size)
        if weights is not None:
            check_any_format(model, self._anatomy, Plan.dense(model, weights))
        tokens, windows = (-(-tokens // 2), -(-windows // 2)) if fast else (tokens, windows)
        self.model, self.windows, self.fast, self.progress, self.weights = model, windows, fast, progress, weights
        self.tokens, self.seed = tokens, seed
        self.calibration = _calibration_text(model, tokenizer, text, tokens, seed, progress)
        self.seen, self.searched, self.checked = self.calibration.split(0.6, 0.2, 0.2)
        self.window = min(WINDOW, _longest(model), len(self.searched.ids), len(self.checked.ids)) // 2 * 2
        if self.window < 16:
            raise CoreskipError(
                f"the text ({self.calibration.source}) has {len(self.calibration.ids)} tokens; at least 100 are "
                "needed, some 10,000 are good"
            )
        self.calibrator = Calibrator(
            model,
            self.seen,
            weights=weights,
            first_layer=first_layer,
            max_tokens=tokens,
            seed=seed,
            progress=progress,
            **options,
        )
        about = {**options, "score": options.get("score"), "first_layer": first_layer, "tokens": tokens, "seed": seed}
        self._about = about if weights is None else {**about, "weights": weights}
        self._covered = refusal(model, self._anatomy) is None
        self._emulations: dict[tuple[str, int], Emulation] = {}

    def identity(self) -> str:
        """What a plan's quality depends on besides the plan: the model, the text, the options."""
        probes = hashlib.sha256(Fingerprint.of(self.model).probes.numpy().tobytes()).hexdigest()
        how = "decoded" if self._covered else "estimated"  # what was measured otherwise is not taken up again
        about = [probes, self.calibration.fingerprint(), self._about, self.windows, self.window, how]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def measure(self, plan: Plan, part: str = "checked", windows: int | None = None) -> dict[str, Any]:
        """`evaluate_all`'s figures on the part ``searched`` or ``checked``; on so many windows, fewer or more than the
        study's own. Of what is searched they are estimated where steps run on the modules."""
        text = self.checked if part == "checked" else self.searched
        options: dict[str, Any] = {"window": self.window, "progress": self.progress}
        if any(layer.by_prompt for layer in plan.layers):
            return evaluate_all(self.model, [plan], text, windows=windows or self.windows, **options)[0]
        emulation = self.windows_of(part, windows)
        # on the modules a token takes several times as long as in one pass, natively half as long
        real = part == "checked" or (runs_natively(self._anatomy, plan) and self._covered)
        return emulation.score(plan, windows, token_by_token=real)

    def windows_of(self, part: str, windows: int | None = None) -> Emulation:
        """The windows of a part, so many at least, prefilled and scored densely once."""
        prefilled = max(windows or 0, self.windows)
        if (part, prefilled) not in self._emulations:
            text = self.checked if part == "checked" else self.searched
            weights = next((each.weights for each in self._emulations.values()), None)
            self._emulations[part, prefilled] = Emulation(
                self.model, text, windows=prefilled, window=self.window, weights=weights, progress=self.progress
            )
        return self._emulations[part, prefilled]

    def measured(self, plan: Plan) -> Plan:
        """The plan in the study's weights, with its quality on the part held out from everything."""
        plan = replace(plan, weights=self.weights)
        return replace(plan, quality=self.measure(plan), calibration=self.provenance())

    def provenance(self) -> dict[str, Any]:
        """The calibration text, as a plan remembers it, and how many of its tokens were observed."""
        return {**self.calibration.fingerprint(), "observed": self.calibrator.observed}


def _longest(model: Any) -> int:
    return most_positions(model, WINDOW)


def _calibration_text(
    model: Any, tokenizer: Any, text: str | os.PathLike[str] | TokenText | None, tokens: int, seed: int, progress: bool
) -> TokenText:
    if text is not None:
        return text_of(tokenizer, text)
    # half of what a given text would provide: sampling is some ten times slower than observing
    return model_text(model, tokenizer, tokens=-(-tokens // 2), length=WINDOW, seed=seed, progress=progress)


class Calibrator:
    """Makes plans for one model from one observation of it.

    Args:
        text: what is observed; at most `max_tokens` of it.
        weights: what plans are made for where `make` is not told.
        options: of the methods, see `OPTIONS_OF`; each method takes those that it has.
        the others: as in `analyze`.

    Attributes:
        observed: tokens that the plans made so far rest on, at most.
    """

    def __init__(
        self,
        model: Any,
        text: TokenText,
        *,
        weights: str | None = None,
        first_layer: int = 0,
        max_tokens: int = 16384,
        seed: int = 0,
        progress: bool = True,
        **options: Any,
    ) -> None:
        for name, value in options.items():
            check_value(name, value)
        self._model, self._text, self._progress, self._options = model, text, progress, options
        self._weights = weights
        self._first, self._seed, self._max_tokens = first_layer, seed, max_tokens
        self.observed = 0
        self._fingerprint = Fingerprint.of(model)
        _check_rank(options.get("rank"), self._fingerprint.hidden_size)
        self._stats: dict[tuple[Score, float], list[LayerStats]] = {}
        self._scored: dict[str, NeuronScores] = {}
        self._sentences: dict[tuple[Score, float], list[Tensor]] = {}
        self._made: dict[tuple[Any, ...], Plan] = {}

    def make(self, method: str, keep: float, *, weights: str | None = None, **options: Any) -> Plan:
        """A plan of this method that keeps this share of the neurons, or layers. `weights` and `options` replace those
        given to the calibrator: in 4-bit weights ``sketch`` and ``topk`` choose by what the weights' own bits say.

        Deterministic; observes the text when a method first needs it. A plan is made once: searches ask for it again
        on more windows, in other formats and for other budgets.
        """
        known = {each.name for each in fields(OPTIONS_OF[method])}
        own = {name: value for name, value in self._options.items() if name in known}
        chosen = options_of(method, {**own, **options})
        form = self._form(method, chosen, weights or self._weights)
        key = (form, keep, chosen)
        if key not in self._made:
            self._made[key] = getattr(self, f"_{form.replace('-', '_')}")(keep, chosen)
        return self._made[key]

    def _form(self, method: str, options: Any, weights: str | None) -> str:
        """Which way of making a method's plans goes with the weights.

        Raises:
            CoreskipError: the options are of other weights.
        """
        four = weights == "int4" or (weights == AS_PACKED and vars(self._model).get(PACKED_AS) == "int4")
        if method == "topk":
            if options.gated and not four:
                raise CoreskipError("gates choose up rows of weights in 4 bits: add weights int4")
            return "exact_rows" if four else "topk"
        if method == "sketch":
            check_bits(options.bits, in_four_bits=four)
            return "planes" if four and options.bits in (None, 3) else "sketch"
        return method

    def _windows(self, length: int) -> Tensor:
        """Token ids ``[rows, length]`` of the text, or of as much as may be observed."""
        length = min(length, _longest(self._model), len(self._text.ids) + len(self._text.prefix))
        rows = self._text.windows(length, max(1, self._max_tokens // length))
        self.observed = max(self.observed, rows.numel())
        return rows

    def _layers(self, keep: float, options: LayersOptions) -> Plan:
        depth = len(self._fingerprint.intermediate_sizes)
        worth = self._worth(options.leave)
        order = sorted(range(self._first, depth), key=worth.__getitem__)
        policies = skip_policies(options.leave, order[: skipped_layers(keep, depth)], depth)
        recipe = {"method": "layers", "leave": options.leave, "keep": keep}
        recipe |= {"first_layer": self._first, "seed": self._seed}
        layers = tuple(LayerPlan(layer=policy) for policy in policies)
        return Plan(layers, self._fingerprint, recipe, self._text.fingerprint())

    def _worth(self, leave: Leave) -> list[float]:
        """Of each layer, or half of it: by what was measured to choose best, see `half_losses`."""
        if leave == "layers":
            return self._influence
        column = 0 if leave == "attentions" else 1
        return cast("list[float]", self._half_losses[:, column].tolist())

    @cached_property
    def _influence(self) -> list[float]:
        return [each.layer for each in block_influence(self._model, self._few_windows.split(1))]

    @cached_property
    def _half_losses(self) -> Tensor:
        return half_losses(self._model, self._few_windows, seed=self._seed, progress=self._progress)

    @cached_property
    def _few_windows(self) -> Tensor:
        length = min(_SENTENCE, _longest(self._model), len(self._text.ids) + len(self._text.prefix))
        rows = self._text.windows(length, max(1, self._max_tokens // _PER_WINDOW))
        self.observed = max(self.observed, rows.numel())
        return rows

    def _experts(self, keep: float, options: ExpertsOptions) -> Plan:
        generator = torch.Generator().manual_seed(self._seed)
        found = self._anatomy.experts
        policies = [
            kept_experts(stats, options.score, keep, experts.top_k, generator) if stats and experts else AllExperts()
            for stats, experts in zip(self._expert_stats, found, strict=True)
        ]
        return self._of_experts(policies, {"method": "experts", "keep": keep, "score": options.score})

    def _core_experts(self, keep: float, options: MethodOptions) -> Plan:
        policies = [
            AllExperts() if experts is None else CoreExperts(max(experts.top_k, kept_count(experts.count, keep)))
            for experts in self._anatomy.experts
        ]
        return self._of_experts(policies, {"method": "core-experts", "keep": keep})

    def _thin_experts(self, keep: float, options: MethodOptions) -> Plan:
        policies = [AllExperts() if stats is None else thin_experts(stats, keep) for stats in self._expert_stats]
        return self._of_experts(policies, {"method": "thin-experts", "keep": keep})

    def _skip_experts(self, keep: float, options: SkipExpertsOptions) -> Plan:
        policies = [
            AllExperts() if stats is None else skipped_experts(stats, keep, options.beta)
            for stats in self._expert_stats
        ]
        how = {"keep": keep} if options.beta is None else {"beta": options.beta}
        return self._of_experts(policies, {"method": "skip-experts", **how})

    def _of_experts(self, policies: Sequence[ExpertPolicy], recipe: dict[str, Any]) -> Plan:
        chosen = [policy if index >= self._first else AllExperts() for index, policy in enumerate(policies)]
        recipe = {**recipe, "first_layer": self._first, "seed": self._seed}
        layers = tuple(LayerPlan(experts=policy) for policy in chosen)
        return Plan(layers, self._fingerprint, recipe, self._text.fingerprint())

    @cached_property
    def _anatomy(self) -> Anatomy:
        return dissect(self._model)

    @cached_property
    def _expert_stats(self) -> list[ExpertStats | None]:
        rows = self._windows(WINDOW)
        return observe_experts(self._model, rows.split(1), total=len(rows), progress=self._progress)

    def _core(self, keep: float, options: CoreOptions) -> Plan:
        policy = CoreNeurons(options.alpha, keep, options.score)
        return self._by_score("core", keep, [policy] * len(self._fingerprint.intermediate_sizes), options)

    def _static(self, keep: float, options: StaticOptions) -> Plan:
        if options.score in SCORES:
            stats = self._observe(options, sentences=False)
            sets = [static_set(each, options.score, keep).cpu() for each in stats]
        else:
            sets = list(self._scores(options.score).top(keep))
        return self._by_score("static", keep, [Static(kept) for kept in sets], options)

    def _scores(self, method: str) -> NeuronScores:
        """By a source of scores other than those that `observe` sums up."""
        if method not in self._scored:
            self._scored[method] = scored(
                self._model, source_of(method, {}), {"text": self._text},
                tokens=self._max_tokens, seed=self._seed, progress=self._progress,
            )  # fmt: skip
            self.observed = max(self.observed, min(self._max_tokens, len(self._text.ids)))
        return self._scored[method]

    def _similar(self, keep: float, options: SimilarOptions) -> Plan:
        self._observe(options, sentences=True)
        found = cluster_sentences(self._sentences[options.score, options.alpha], keep, self._seed)
        clusters = Clusters(found.anchor, options.alpha, keep, options.score, found.centroids)
        return self._by_score("similar", keep, [Similar(sets) for sets in found.sets], options, clusters)

    @cached_property
    def tokens(self) -> TokenCalibration:
        """What is known of single tokens."""
        return TokenCalibration(self._model, self._windows(WINDOW), seed=self._seed, progress=self._progress)

    def _sketch(self, keep: float, options: SketchOptions) -> Plan:
        if options.bits == 1:
            recall = round(self.tokens.sign_recall(keep), 4)
            return self._by_token("sketch", keep, self.tokens.signs(keep), bits=1, recall=recall)
        policies = self.tokens.sketch(keep, options.allocation, refine=options.refine)
        refined = {"refine": True} if options.refine else {}
        return self._by_token("sketch", keep, policies, allocation=options.allocation, **refined)

    def _topk(self, keep: float, options: TopKOptions) -> Plan:
        policies = self.tokens.topk(keep, options.allocation)
        return self._by_token("topk", keep, policies, allocation=options.allocation)

    def _planes(self, keep: float, options: SketchOptions) -> Plan:
        policies = self.tokens.in_four_bits(Form.PLANES, keep, options.allocation)
        return self._by_token("sketch", keep, policies, bits=3, allocation=options.allocation)

    def _exact_rows(self, keep: float, options: TopKOptions) -> Plan:
        policies = self.tokens.in_four_bits(Form.GATES if options.gated else Form.ROWS, keep, options.allocation)
        gated = {"gated": True} if options.gated else {}
        return self._by_token("topk", keep, policies, allocation=options.allocation, **gated)

    def _learned(self, keep: float, options: LearnedOptions) -> Plan:
        policies = self.tokens.learned(keep, options.rank)
        found = sum(policy.recall or 0.0 for policy in policies) / len(policies)
        return self._by_token("learned", keep, policies, rank=options.rank, recall=round(found, 4))

    def _bricks(self, keep: float, options: BricksOptions) -> Plan:
        seen, mlps = self.tokens.samples, list(self._anatomy.mlps)
        made = make_bricks(
            mlps, seen.hidden, seen.activations, down_norms(self._anatomy),
            keep=keep, seed=self._seed, progress=self._progress, **vars(options),
        )  # fmt: skip
        return self._by_token("bricks", keep, made, **vars(options))

    def _threshold(self, keep: float, options: ThresholdOptions) -> Plan:
        policies = self.tokens.threshold(keep, cast(Any, options.rule), everywhere=options.all_linears)
        return self._by_token("threshold", keep, policies, rule=options.rule, all_linears=options.all_linears)

    def _by_token(self, method: str, keep: float, policies: Sequence[NeuronPolicy], **recipe: Any) -> Plan:
        return self._plan(policies, keep, {"method": method, "keep": keep, **recipe})

    def _by_score(
        self,
        method: str,
        keep: float,
        policies: Sequence[NeuronPolicy],
        options: Scored,
        clusters: Clusters | None = None,
    ) -> Plan:
        recipe: dict[str, Any] = {"method": method, "keep": keep, "score": options.score}
        if options.score in WITH_ALPHA:
            recipe["alpha"] = options.alpha
        return self._plan(policies, keep, recipe, clusters)

    def _plan(
        self, policies: Sequence[NeuronPolicy], keep: float, recipe: dict[str, Any], clusters: Clusters | None = None
    ) -> Plan:
        widths = self._fingerprint.intermediate_sizes
        layers = [
            LayerPlan(policy) if index >= self._first and kept_count(width, keep) < width else LayerPlan()
            for index, (policy, width) in enumerate(zip(policies, widths, strict=True))
        ]
        recipe = {**recipe, "first_layer": self._first, "seed": self._seed}
        return Plan(tuple(layers), self._fingerprint, recipe, self._text.fingerprint(), None, clusters)

    def _observe(self, options: Scored, sentences: bool) -> list[LayerStats]:
        """One pass over the text, with the sentences' own counts where a method needs them."""
        key = cast(Score, options.score), options.alpha
        if key in self._stats and (key in self._sentences or not sentences):
            return self._stats[key]
        rows = self._windows(_SENTENCE)
        counter = SentenceCounter(down_norms(dissect(self._model)), *key) if sentences else None
        self._stats[key] = observe(
            self._model,
            rows.split(1),
            alpha=options.alpha,
            scores=[key[0]],
            total=len(rows),
            progress=self._progress,
            tap=counter,
        )
        if counter is not None:
            self._sentences[key] = counter.counts()
        return self._stats[key]


def _check_rank(rank: int | None, hidden: int) -> None:
    if rank is not None and rank > hidden:
        raise CoreskipError(f"rank is {rank}: more than the model's hidden size, {hidden}, saves nothing")
