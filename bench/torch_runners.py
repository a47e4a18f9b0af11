"""Runners of PyTorch models: transformers, and coreskip in its ways to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import CompileConfig, GenerationConfig, StaticCache

from coreskip.bench.clock import Generation, Stopwatch, greedy
from coreskip.bench.runner import FORMATS, Runner, Scored
from coreskip.bench.workloads import byte_ids
from coreskip.predictors.calibration import TokenText, tokenize
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.observe import inference
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import CoreNeurons
from coreskip.runtime.cost import bytes_per_token, loaded_bytes
from coreskip.runtime.engine import Engine
from coreskip.runtime.load import load, packed_for
from coreskip.runtime.quality import evaluate_all
from coreskip.runtime.wrap import is_wrapped, runtime_of, unwrap, wrap


class HuggingFace(Runner):
    """transformers, eager, with its dynamic KV cache."""

    packed: bool | None = False  # whether packed folders and GGUF files stay so

    def load(self) -> None:
        formats = self.job.dtype in FORMATS  # coreskip's own, packed from what is loaded
        dtype = torch.float32 if formats else getattr(torch, self.job.dtype)
        device = torch.device(self.job.device)
        self.tokenizer: Any = None
        if self.job.shape is not None:
            self.model: Any = self.job.shape.build(dtype, device)
        else:
            packed = packed_for(self.job.model, self.job.dtype) if self.packed is None else self.packed
            self.model, self.tokenizer = load(self.job.model, dtype=dtype, device=device, packed=packed)
        # greedy, without the checkpoint's penalties and without an end
        self.model.generation_config = cast(Any, GenerationConfig)(do_sample=False, pad_token_id=0)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included."""
        if self.tokenizer is None:
            return [byte_ids(text, self.model.config.vocab_size) for text in texts]
        return [list(self.tokenizer(text).input_ids) for text in texts]

    def scored_text(self, text: str, source: str) -> TokenText:
        return tokenize(self.tokenizer, text, source)

    def generate(self, ids: Sequence[int], new: int) -> Generation:
        prompt = torch.tensor([ids], device=self.model.device)
        return greedy(self.model, prompt, new, **self._fresh_cache())[1]

    def _fresh_cache(self) -> dict[str, Any]:
        return {}  # generate makes one

    def regrets(self, ids: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """How much worse than the best choice each token is, in nats, by this runner's own decode policy: 0 where it
        is the one that greedy decoding takes. One prefill of `ids`, then one pass over `tokens`."""
        prompt, rest = torch.tensor([ids]), torch.tensor([list(tokens)])
        prompt, rest = prompt.to(self.model.device), rest.to(self.model.device)
        with inference(self.model):
            out = self.model(input_ids=prompt, use_cache=True)
            logits = [out.logits[0, -1:]]
            if len(tokens) > 1:
                out = self.model(input_ids=rest[:, :-1], past_key_values=out.past_key_values, use_cache=True)
                logits.append(out.logits[0])
        scores = torch.cat(logits).float().log_softmax(-1)
        chosen = scores.gather(1, rest[0].unsqueeze(1)).squeeze(1)
        return (scores.max(-1).values - chosen).tolist()

    def weight_bytes(self) -> int:
        return loaded_bytes(self.model)

    def perplexity(self, text: TokenText, windows: int) -> Scored | None:
        measured = evaluate_all(self.model, [Plan.dense(self.model)], text, windows=windows, progress=False)[0]
        return measured["dense"]["ppl"], measured["tokens"]


class Compiled(HuggingFace):
    """transformers with torch.compile over a static KV cache; prefill stays eager, as transformers does it.

    A compiled graph per prompt length would cost more than it saves, and a frozen graph is the fastest one on a CPU.
    """

    def load(self) -> None:
        compiling: Any = CompileConfig(mode="default" if self.job.device == "cpu" else "reduce-overhead")
        compiling._compile_all_devices = True  # else transformers compiles on accelerators only
        cast(Any, torch._inductor).config.freezing = self.job.device == "cpu"
        super().load()
        self.model.generation_config.compile_config = compiling
        # One cache for good: a frozen graph keeps the addresses of the first one, and with a fresh cache per prompt,
        # as generate makes them, every output from the second prompt on was wrong (by 14 nats).
        self._cache: Any = StaticCache(config=self.model.config, max_cache_len=self.job.context)

    def _fresh_cache(self) -> dict[str, Any]:
        self._cache.reset()
        return {"past_key_values": self._cache}

    def perplexity(self, text: TokenText, windows: int) -> Scored | None:
        return None  # scoring would run the eager model, which is not what was timed


class Coreskip(HuggingFace):
    """coreskip under a plan: the job's, or one that skips nothing."""

    exact = False
    packed = None

    def load(self) -> None:
        super().load()
        self.plan = self._plan()
        # both counted while the originals are there: the native step's check of its first result may refuse it
        self._covered = bytes_per_token(self.model, self.plan)
        self._on_modules = bytes_per_token(self.model, self.plan, native=False)
        self._wrap()

    def _wrap(self) -> None:
        wrap(self.model, self.plan, exact=self.exact, keep_originals=None if self.exact else False)

    @property
    def _bytes(self) -> int:
        """Of weights that a decode step reads where it ran."""
        return self._covered if runtime_of(self.model).steps.native.refusal is None else self._on_modules

    def _plan(self) -> Plan:
        dense = Plan.dense(self.model, self.job.dtype if self.job.dtype in FORMATS else None)
        if self.job.plan is None:
            return dense
        if isinstance(self.job.plan, Path):
            plan = Plan.load(self.job.plan)
            return replace(plan, weights=dense.weights or plan.weights)
        policy = CoreNeurons(alpha=0.4, beta=self.job.plan, score="griffin")
        layers = tuple(LayerPlan(policy) for _ in dense.layers)
        recipe = {"method": "core", "keep": self.job.plan, "score": "griffin"}
        return Plan(layers, dense.model, recipe, weights=dense.weights)

    def weight_bytes(self) -> int:
        return self._bytes

    def perplexity(self, text: TokenText, windows: int) -> Scored | None:
        super().load()  # the wrapped one's originals may be gone
        measured = evaluate_all(self.model, [self.plan], text, windows=windows, progress=False)[0]
        self._wrap()
        return measured["sparse"]["ppl"], measured["tokens"]

    def traits(self) -> dict[str, Any]:
        return {
            "dtype": self.plan.weights or self.job.dtype,
            "method": str(self.plan.recipe.get("method", "unknown")),
            "keep": self.plan.keep,
            "neurons_skipped": runtime_of(self.model).usage.neuron_sparsity(),
        }

    def close(self) -> None:
        if is_wrapped(self.model) and runtime_of(self.model).removable:
            unwrap(self.model)


class CoreskipExact(Coreskip):
    """Exact mode: the dense model's own text. Unless the job has a plan, 4-bit weights and the text itself draft."""

    exact = True

    def _plan(self) -> Plan:
        return Plan.dense(self.model, "int4") if self.job.plan is None else super()._plan()

    def weight_bytes(self) -> int:
        """What tokens cost on average: verification passes and draft steps together."""
        done = runtime_of(self.model).exact
        last = None if done is None else done.last
        total = bytes_per_token(self.model, Plan.dense(self.model))
        if last is None or last.tokens == 0:
            return total
        return round((last.passes * total + last.drafted["plan"] * self._bytes) / last.tokens)

    def perplexity(self, text: TokenText, windows: int) -> Scored | None:
        return None  # that of the dense model

    def traits(self) -> dict[str, Any]:
        return {"dtype": self.job.dtype, "method": "exact", "keep": 1.0, "neurons_skipped": 0.0}


class CoreskipEngine(Coreskip):
    """`Engine.generate`: from a text to the text of its continuation."""

    def generate(self, ids: Sequence[int], new: int) -> Generation:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if list(self.tokenizer(text).input_ids) != list(ids):
            raise CoreskipError("an engine takes texts, and this prompt's tokens are not those of its text")
        watch = Stopwatch()
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "streamer": watch}
        Engine(self.model, self.tokenizer).generate(text, max_new_tokens=new, **options)
        return watch.generation()


class CoreskipLookup(CoreskipEngine):
    """The same with drafts from the text itself, which the plan verifies: the same text."""

    def _wrap(self) -> None:
        wrap(self.model, self.plan, keep_originals=False, lookup=True)

    def weight_bytes(self) -> int:
        """What a token costs on average: a pass over several reads the weights once."""
        done = runtime_of(self.model).lookup
        last = None if done is None else done.last
        return self._bytes if last is None or not last.tokens else round(last.passes * self._bytes / last.tokens)
