"""An adapter for EleutherAI's lm-evaluation-harness, which scores as the model would generate: under the plan.

The harness scores a continuation in one pass together with its context, which is a prefill: a plan, which acts on
decode steps, would never show. Here the context is prefilled, all but its last token, and every token of the
continuation is scored by a decode step, in passes of eight tokens as `evaluate` makes them.

    import lm_eval
    from coreskip.runtime.lm_evaluation import language_model

    lm_eval.simple_evaluate(model=language_model(model, tokenizer, plan="my.plan"), tasks=["arc_easy"])

After ``language_model`` or `register` was called, ``model="coreskip"`` with ``model_args="model=...,plan=..."`` does
the same by name. The harness is imported by these two alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tqdm.auto import tqdm

from ..kernels.ops import MAX_ROWS
from ..predictors.calibration import most_positions
from ..predictors.errors import CoreskipError
from ..predictors.observe import inference
from ..predictors.plan import Plan
from .engine import Engine
from .load import load
from .quality import decode_logits

_LENGTH = 2048  # tokens, where a model's configuration does not tell how many it was made for
_NEW_TOKENS = 256  # where a task does not tell


class Likelihoods:
    """What the harness asks of a language model, by an `Engine`.

    Args:
        model: a causal LM, or what `load` takes: a folder, a .gguf file, a hub id, or None for the embedded model.
        tokenizer: of a model that is given as such.
        plan, weights, lookup, plain: as for `Engine`.
        dtype, device: as for `load`.
        batch_size, max_batch_size: the harness names them; requests are scored one by one.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        plan: Plan | str | os.PathLike[str] | None = None,
        *,
        weights: str | None = None,
        lookup: bool = False,
        plain: bool = False,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if model is None or isinstance(model, (str, os.PathLike)):
            model, tokenizer = load(model, dtype=dtype, device=device)
        self.engine = Engine(model, tokenizer, plan, weights=weights, lookup=lookup, plain=plain)
        self._longest = most_positions(model, _LENGTH)

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.engine.tokenizer, "name_or_path", "")).replace("/", "__")

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each request with ``args`` of (context, continuation): the log-probability of the continuation in nats,
        and whether greedy decoding would give it."""
        found = []
        for request in tqdm(requests, desc="scoring", disable=disable_tqdm, leave=False):
            context, continuation = request.args
            found.append(self._score(*self._pair(context, continuation)))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each request with ``args`` of (text,): the log-probability of all of it in nats, in windows of what the
        model was made for, each after the last token of the one before."""
        found = []
        for request in tqdm(requests, desc="scoring", disable=disable_tqdm, leave=False):
            ids = [self._start(), *self._encode(request.args[0])]
            step = self._longest - 1
            pieces = [ids[i : i + step + 1] for i in range(0, len(ids) - 1, step)]
            found.append(sum(self._score(piece[:1], piece[1:])[0] for piece in pieces))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each request with ``args`` of (context, options): what is generated, up to one of ``until``."""
        found = []
        for request in tqdm(requests, desc="generating", disable=disable_tqdm, leave=False):
            context, given = request.args
            options = dict(given)
            until = options.pop("until", None) or []
            most = options.pop("max_gen_toks", None) or options.pop("max_new_tokens", None) or _NEW_TOKENS
            options.setdefault("do_sample", bool(options.get("temperature")))
            if not options["do_sample"]:
                options.pop("temperature", None)
            stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
            found.append(self.engine.generate(context, max_new_tokens=int(most), stop_strings=stops, **options))
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat, by the tokenizer's template."""
        return str(
            self.engine.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.engine.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _start(self) -> int:
        """The token that stands before every text."""
        tokenizer = self.engine.tokenizer
        found = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return next((int(id) for id in found if id is not None), 0)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both; spaces at the context's end belong to the continuation, as its first token has them."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            return [self._start()], self._encode(continuation)
        whole, before = self._encode(context + continuation), self._encode(context)
        return before, whole[len(before) :]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if not continuation:
            raise CoreskipError("a continuation has no tokens: there is nothing to score")
        context = context[-max(1, self._longest - len(continuation)) :]
        model = self.engine.model
        self.engine.acquire()
        ids = torch.tensor([[*context, *continuation]], device=model.device)
        ahead = max(1, len(context) - 1)  # of a context of one token there is nothing to prefill before it
        with inference(model):
            logits = decode_logits(model, ids, MAX_ROWS, ahead)[-len(continuation) :].log_softmax(-1)
        wanted = ids[0, -len(continuation) :]
        chosen = logits.gather(1, wanted.unsqueeze(1))
        return float(chosen.double().sum()), bool((logits.argmax(-1) == wanted).all())


@cache
def register() -> type[Any]:
    """The class of language models that the harness takes, registered there as ``coreskip``.

    Raises:
        CoreskipError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError:
        raise CoreskipError("lm-evaluation-harness is not installed: run `pip install lm-eval`") from None
    cls: type[Any] = type("CoreskipLM", (Likelihoods, LM), {"__doc__": Likelihoods.__doc__})
    register_model("coreskip")(cls)
    return cls


def language_model(*args: Any, **options: Any) -> Any:
    """A language model for ``lm_eval.simple_evaluate``; the arguments are those of `Likelihoods`."""
    return register()(*args, **options)
