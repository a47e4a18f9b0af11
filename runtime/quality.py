"""What a Plan costs in quality, scored the way the model will run: dense prefill of a prompt, then decode steps
under the plan, teacher-forced over real text."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.cache_utils import DynamicLayer

from ..kernels.ops import MAX_ROWS
from ..predictors.anatomy import check_model, dissect
from ..predictors.calibration import TokenText, most_positions, text_of
from ..predictors.checks import check_count, check_weights
from ..predictors.errors import CoreskipError
from ..predictors.observe import inference
from ..predictors.plan import Plan
from .bundles import Weights
from .unknown import refuses_unknown
from .wrap import make_way, runtime_of, wrapped

WINDOW = 512  # tokens; the first half is the prompt, the second half is scored
_DENSE_LOGITS = 1 << 27  # of windows scored densely are kept, 4 bytes each, while the plans are wrapped one by one


@refuses_unknown
def evaluate(
    model: Any,
    tokenizer: Any,
    plan: Plan | str | os.PathLike[str] | None,
    text: str | os.PathLike[str] | TokenText,
    *,
    weights: str | None = None,
    windows: int = 24,
    window: int = WINDOW,
    token_by_token: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Dense against sparse on `text`: `evaluate_all` for one plan, its path or None (dense), and any text, or the
    `Path` of a UTF-8 file; `weights`, "int4" or "int8", in place of the plan's own."""
    check_model(model)
    check_weights(weights)
    make_way(model)
    plan = Plan.of(plan, model)
    plan = plan if weights is None else replace(plan, weights=weights)
    options: dict[str, Any] = {"windows": windows, "window": window}
    options |= {"token_by_token": token_by_token, "progress": progress}
    return evaluate_all(model, [plan], text_of(tokenizer, text), **options)[0]


def evaluate_all(
    model: Any,
    plans: Sequence[Plan],
    text: TokenText,
    *,
    windows: int = 24,
    window: int = WINDOW,
    token_by_token: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Dense against each plan on the same windows of `text`; the dense model runs once per window.

    Each window's first half is prefilled, as in generation; its second half is scored under the plan's decode policy,
    in passes of eight tokens over the filled KV cache. The kernels give each row of such a pass what it has in a pass
    of its own, bit for bit; a pass over all tokens would round otherwise, and where a rule chooses neurons from
    rounded inputs, choose otherwise, too.

    Args:
        model: the unwrapped model the plans were made for.
        text: scored text; use one that neither calibrated nor chose the plans.
        windows: at most this many, evenly spread over the text.
        window: tokens per window, an even number of at least 4.
        token_by_token: passes of one token: the same figures in several times the time, for whoever doubts it.

    Returns:
        per plan ``{"dense": {"ppl"}, "sparse": {"ppl"}, "ppl_increase", "ppl_increase_stderr", "kl",
        "top1_agreement", "neuron_sparsity", "tokens", "windows", "window", "text"}``. ``ppl_increase`` is relative
        (0.01 is +1 %), its standard error is over windows; ``kl`` is KL(dense || sparse) in nats per token;
        ``neuron_sparsity`` the share of MLP neurons that decode steps skipped, as counted while running.

    Raises:
        CoreskipError: text too short, another model's plan, model wrapped already.
    """
    make_way(model)
    check_count("windows", windows)
    check_count("window", window, 4)
    if window % 2:
        raise CoreskipError(f"window is {window}; it must be even: the first half is the prompt, the second is scored")
    anatomy = dissect(model)
    for plan in plans:
        plan.check(model, anatomy)
        if plan.abstains:
            raise CoreskipError(
                "a plan that ends texts before they begin has no perplexity: count what it abstains from"
            )
    rows = text.windows(min(window, most_positions(model, window) // 2 * 2), windows)
    tallies, weights = [Tally() for _ in plans], Weights(anatomy)
    group = max(1, _DENSE_LOGITS // (rows.shape[1] // 2 * model.config.get_text_config().vocab_size))
    bar = tqdm(total=len(rows) * (1 + len(plans)), desc="scoring", unit="window", disable=not progress, leave=False)
    with inference(model), bar:
        for some in rows.split(group):
            some = some.to(model.device)
            dense = [decode_logits(model, ids, ids.shape[1]).log_softmax(-1) for ids in some.split(1)]
            bar.update(len(some))
            for plan, tally in zip(plans, tallies, strict=True):
                with wrapped(model, plan, weights):
                    usage = runtime_of(model).usage
                    usage.counting = True
                    for ids, log_p in zip(some.split(1), dense, strict=True):
                        usage.reset()
                        sparse = decode_logits(model, ids, 1 if token_by_token else MAX_ROWS).log_softmax(-1)
                        tally.add(log_p, sparse, ids[0, ids.shape[1] // 2 :], usage.neuron_sparsity())
                        bar.update()
    about = {"windows": rows.shape[0], "window": rows.shape[1], "text": text.source}
    return [{**tally.result(), **about} for tally in tallies]


def decode_logits(model: Any, ids: Tensor, at_once: int, prompt_length: int | None = None) -> Tensor:
    """fp32 logits ``[scored tokens, vocabulary]`` that predict what follows the first `prompt_length` tokens, by
    default the first half, of ids ``[1, window]``.

    The first row comes from prefill, the others from decode steps of `at_once` tokens, as in generation.
    """
    half = -(-ids.shape[1] // 2)
    prompt, rest = ids.tensor_split([half if prompt_length is None else prompt_length], dim=1)
    keep_last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    out = model(input_ids=prompt, use_cache=True, **keep_last)
    at_once = at_once if takes_several(out.past_key_values) else 1
    logits = [out.logits[0, -1:]]
    for piece in rest[:, :-1].split(at_once, dim=1):
        out = model(input_ids=piece, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0])
    return torch.cat(logits).float()


def takes_several(cache: Any) -> bool:
    """Whether a model goes on from a filled cache with several tokens as with one after the other: some recurrent
    layers begin anew where they are given several."""
    keeps_all = bool(getattr(cache, "is_croppable", True))  # else something is remembered beside keys and values
    return keeps_all and all(isinstance(layer, DynamicLayer) for layer in cache.layers)


class Tally:
    """Sums over windows of negative log-likelihoods, divergence and agreement."""

    def __init__(self) -> None:
        self.dense: list[float] = []
        self.sparse: list[float] = []
        self.sparsity: list[float] = []
        self.kl = 0.0
        self.agree = self.tokens = 0

    def add(
        self, log_p: Tensor, log_q: Tensor, targets: Tensor, neuron_sparsity: float, dense_loss: float | None = None
    ) -> None:
        """One window: dense and sparse log-probabilities ``[tokens, vocabulary]``, target ids ``[tokens]``; the dense
        loss where it is known more precisely than `log_p`."""
        targets = targets.unsqueeze(1)
        self.sparsity.append(neuron_sparsity)
        self.dense.append(-float(log_p.gather(1, targets).mean()) if dense_loss is None else dense_loss)
        self.sparse.append(-float(log_q.gather(1, targets).mean()))
        self.kl += _divergence(log_p, log_q)
        self.agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        self.tokens += targets.shape[0]

    def result(self) -> dict[str, Any]:
        dense, sparse = (
            torch.tensor(losses, dtype=torch.float32, device="cpu").double() for losses in (self.dense, self.sparse)
        )
        change = sparse - dense
        increase = math.expm1(float(change.mean()))
        spread = float(change.std() / math.sqrt(len(change))) if len(change) > 1 else float("nan")
        return {
            "dense": {"ppl": math.exp(float(dense.mean()))},
            "sparse": {"ppl": math.exp(float(sparse.mean()))},
            "ppl_increase": increase,
            "ppl_increase_stderr": None if math.isnan(spread) else (1 + increase) * spread,
            "kl": self.kl / self.tokens,
            "top1_agreement": self.agree / self.tokens,
            "neuron_sparsity": sum(self.sparsity) / len(self.sparsity),
            "tokens": self.tokens,
        }


def _divergence(log_p: Tensor, log_q: Tensor) -> float:
    """The sum of KL(p || q) over rows, added up from q - p + p log(p / q): what logarithms are rounded by in float32,
    up to 1e-6, then counts in second order alone."""
    p, d = log_p.exp(), log_p - log_q
    near = p * (torch.expm1(-d) + d)
    return float(torch.where(d.abs() < 1, near, log_q.exp() - p + p * d).sum())


def summary(quality: dict[str, Any]) -> str:
    """`evaluate`'s result for people."""
    error = quality["ppl_increase_stderr"]
    spread = "" if error is None else f" ± {error:.1%}"
    rows = [
        ("perplexity, dense", f"{quality['dense']['ppl']:.3f}"),
        ("perplexity, sparse", f"{quality['sparse']['ppl']:.3f}  ({quality['ppl_increase']:+.2%}{spread})"),
        ("KL(dense || sparse)", f"{quality['kl']:.4f} nats per token"),
        ("top-1 agreement", f"{quality['top1_agreement']:.1%}"),
        ("MLP neurons skipped", f"{quality['neuron_sparsity']:.1%}"),
        (
            "scored",
            f"{quality['tokens']} tokens in {quality['windows']} windows of {quality['window']}, {quality['text']}",
        ),
    ]
    return "\n".join(f"{name:22}{value}" for name, value in rows)
