"""What a Plan costs in quality, scored the way the model will run: dense prefill of a prompt, then decode steps
under the plan, teacher-forced over real text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..kernels.ops import MAX_ROWS
from ..predictors.anatomy import dissect
from ..predictors.calibration import TokenText, tokenize
from ..predictors.errors import CoreskipError
from ..predictors.observe import inference
from ..predictors.plan import Plan
from .selections import prefilling
from .wrap import is_wrapped, runtime_of, wrap

WINDOW = 512  # tokens; the first half is the prompt, the second half is scored


def evaluate(model: Any, tokenizer: Any, plan: Plan, text: str | TokenText, **options: Any) -> dict[str, Any]:
    """Dense against sparse on `text`: `evaluate_all` for one plan and any text."""
    if isinstance(text, str):
        text = tokenize(tokenizer, text)
    return evaluate_all(model, [plan], text, **options)[0]


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

    Each window's first half is prefilled densely, as in generation; its second half is scored under the plan's
    decode policy. By default that half runs as one pass over the filled KV cache, which the runtime treats as what
    it is: decode. Selections are made in prefill, so one pass and `token_by_token` give the same logits up to
    rounding; a test holds them together.

    Args:
        model: the unwrapped model the plans were made for.
        text: scored text; use one that neither calibrated nor chose the plans.
        windows: at most this many, evenly spread over the text.
        window: tokens per window, an even number of at least 4.

    Returns:
        per plan ``{"dense": {"ppl"}, "sparse": {"ppl"}, "ppl_increase", "ppl_increase_stderr", "kl",
        "top1_agreement", "neuron_sparsity", "tokens", "windows", "window", "text"}``. ``ppl_increase`` is relative
        (0.01 is +1 %), its standard error is over windows; ``kl`` is KL(dense || sparse) in nats per token;
        ``neuron_sparsity`` the share of MLP neurons that decode steps skipped, as counted while running.

    Raises:
        CoreskipError: text too short, another model's plan, model wrapped already.
    """
    if is_wrapped(model):
        raise CoreskipError("the model is wrapped already: call coreskip.unwrap(model) first")
    if window < 4 or window % 2 or windows < 1:
        raise CoreskipError(f"{windows} windows of {window} tokens: give at least one, of an even 4 tokens or more")
    anatomy = dissect(model)
    for plan in plans:
        plan.check(model, anatomy)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or window
    rows = text.windows(min(window, longest // 2 * 2), windows)
    tallies = [Tally() for _ in plans]
    with inference(model):
        for ids in tqdm(rows.split(1), desc="scoring", unit="window", disable=not progress, leave=False):
            ids = ids.to(model.device)
            targets = ids[0, ids.shape[1] // 2 :]
            dense = _decode_logits(model, ids, token_by_token).log_softmax(-1)
            for plan, tally in zip(plans, tallies, strict=True):
                if plan.weights is None:
                    with wrap(model, plan):
                        runtime_of(model).usage.counting = True
                        sparse = _decode_logits(model, ids, token_by_token).log_softmax(-1)
                        tally.add(dense, sparse, targets, runtime_of(model).usage.neuron_sparsity())
        for plan, tally in zip(plans, tallies, strict=True):
            if plan.weights is not None:
                _score_native(model, plan, rows, tally, progress)
    about = {"windows": rows.shape[0], "window": rows.shape[1], "text": text.source}
    return [{**tally.result(), **about} for tally in tallies]


def _score_native(model: Any, plan: Plan, rows: Tensor, tally: Tally, progress: bool) -> None:
    """Plans whose weights have a format of their own, which only the native step carries out. They
    are packed once: the dense logits come from the same wrapping, as prefill."""
    with wrap(model, plan, keep_originals=True):
        for ids in tqdm(
            rows.split(1), desc=f"scoring {plan.weights}", unit="window", disable=not progress, leave=False
        ):
            with prefilling():
                dense = _decode_logits(model, ids, False).log_softmax(-1)
            usage = runtime_of(model).usage
            usage.reset()
            sparse = _decode_logits(model, ids, False, MAX_ROWS).log_softmax(-1)
            tally.add(dense, sparse, ids[0, ids.shape[1] // 2 :], usage.neuron_sparsity())


def _decode_logits(model: Any, ids: Tensor, token_by_token: bool, at_once: int | None = None) -> Tensor:
    """fp32 logits ``[scored tokens, vocabulary]`` that predict the second half of ids ``[1, window]``.

    The first row comes from prefill, the others from decode steps, as in generation.
    """
    prompt, rest = ids.tensor_split(2, dim=1)
    keep_last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    out = model(input_ids=prompt, use_cache=True, **keep_last)
    logits = [out.logits[0, -1:]]
    most = 1 if token_by_token else at_once or rest.shape[1]
    for piece in rest[:, :-1].split(most, dim=1):
        out = model(input_ids=piece, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0])
    return torch.cat(logits).float()


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
        self.kl += float((log_p.exp() * (log_p - log_q)).sum())
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
