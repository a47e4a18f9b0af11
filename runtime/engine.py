"""Serving from Python: text in, text out, whole or streamed, from any number of threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from transformers import TextIteratorStreamer

from ..predictors.errors import CoreskipError
from ..predictors.plan import Plan
from .exact import Statistics
from .wrap import is_wrapped, runtime_of, unwrap, wrap

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


class Engine:
    """A model, its tokenizer and a plan, ready to generate.

    Prompts are texts, or chats: lists of ``{"role": ..., "content": ...}`` that the tokenizer's template renders. Every
    keyword argument of ``model.generate`` is taken (``max_new_tokens``, ``do_sample``, ``num_beams``, ...), besides

    - ``stop_strings``: a string or several; the text ends before the first that appears;
    - ``seed``: makes sampling repeatable, whatever other threads do.

    Threads may call at once: each call has its own KV cache and neuron selections. Calls that sample wait for one
    another, since they share the random number generator.

    Args:
        model: a causal LM; wrapped here if a plan is given, until `close`.
        plan: None to use the model as it is (dense, or wrapped by the caller).
        exact: as for `wrap`; without a plan, drafts come from the text alone.
        keep_originals, lookup: as for `wrap`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: Plan | None = None,
        *,
        exact: bool = False,
        keep_originals: bool | None = None,
        lookup: bool = False,
    ) -> None:
        if (plan is not None or exact or lookup) and is_wrapped(model):
            raise CoreskipError("the model is wrapped already: call coreskip.unwrap(model) first, or pass no plan")
        if plan is None and (exact or lookup):
            plan = Plan.dense(model)
        if plan is not None:
            wrap(model, plan, exact=exact, keep_originals=keep_originals, lookup=lookup)
        self.model, self.tokenizer = model, tokenizer
        self._owns_wrapping = plan is not None
        self._sampling = threading.Lock()
        self._tokenizing = threading.Lock()  # fast tokenizers keep padding and truncation as shared state

    def close(self) -> None:
        """Unwrap the model, if this engine wrapped it and its own weights are not gone (``keep_originals=False``)."""
        if self._owns_wrapping:
            self._owns_wrapping = False
            if runtime_of(self.model).removable:
                unwrap(self.model)

    @property
    def statistics(self) -> Statistics | None:
        """Of the generation with drafts (exact mode, lookup) that ended last; None before the first, and without."""
        runtime = runtime_of(self.model) if is_wrapped(self.model) else None
        drafter = None if runtime is None else runtime.exact or runtime.lookup
        return None if drafter is None else drafter.last

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """The continuation of one prompt, or of several at once.

        Returns:
            one text for one prompt, a list for a list of prompts; with ``num_return_sequences`` above 1, a list of
            that many texts in place of each.
        """
        prompts, single = _as_batch(prompt)
        seed, stops, options = _own_options(options)
        inputs = self._encode(prompts)
        output = self._run(inputs, options, seed, stops)
        texts = [_cut(text, stops) for text in self._decode(output[:, inputs["input_ids"].shape[1] :])]
        each = len(texts) // len(prompts)
        if each > 1:
            grouped = [texts[i : i + each] for i in range(0, len(texts), each)]
            return grouped[0] if single else grouped
        return texts[0] if single else texts

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """The continuation of one prompt, piece by piece as it is generated; closing the iterator stops generation.

        An exception in generation is raised here.
        """
        prompts, single = _as_batch(prompt)
        if not single:
            raise CoreskipError("stream takes one prompt; use generate for several")
        if options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1:
            raise CoreskipError("a stream is one sequence: leave out num_beams and num_return_sequences")
        if "streamer" in options:
            raise CoreskipError("a stream has a streamer of its own: leave it out, or use generate")
        seed, stops, options = _own_options(options)
        return _stop_before(self._pieces(self._encode(prompts), options, seed, stops), stops)

    def _pieces(self, inputs: Any, options: dict[str, Any], seed: int | None, stops: list[str]) -> Iterator[str]:
        streamer = _Pieces(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self._run(inputs, {**options, "streamer": streamer}, seed, stops)
            except _Abandoned:
                pass
            except BaseException as error:  # handed to the consumer's thread, which raises it
                failure.append(error)
                streamer.end()  # type: ignore[no-untyped-call]

        thread = threading.Thread(target=work, name="coreskip-stream", daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            streamer.abandoned.set()
            thread.join()
        if failure:
            raise failure[0]

    def _run(self, inputs: Any, options: dict[str, Any], seed: int | None, stops: list[str]) -> torch.Tensor:
        if stops:
            options = {**options, "stop_strings": stops, "tokenizer": self.tokenizer}
        with self._randomness(options, seed):
            output = self.model.generate(**inputs, **options)
        return cast(torch.Tensor, getattr(output, "sequences", output))

    @contextlib.contextmanager
    def _randomness(self, options: dict[str, Any], seed: int | None) -> Iterator[None]:
        """One sampling call at a time, from its own seed if it has one; the caller's random state is untouched."""
        config = options.get("generation_config") or self.model.generation_config
        if not options.get("do_sample", config.do_sample):
            yield
            return
        with self._sampling:
            if seed is None:
                yield
                return
            devices = [self.model.device] if self.model.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                yield

    def _encode(self, prompts: list[Prompt]) -> Any:
        texts = [p if isinstance(p, str) else self._render(p) for p in prompts]
        chats = [not isinstance(p, str) for p in prompts]
        if any(chats) and not all(chats):
            raise CoreskipError("a batch holds texts or chats, not both")
        if any(not text for text in texts):
            raise CoreskipError("a prompt is empty: give some text")
        with self._tokenizing:
            side, pad = self.tokenizer.padding_side, self.tokenizer.pad_token
            try:
                self.tokenizer.padding_side = "left"
                if pad is None:
                    self.tokenizer.pad_token = self.tokenizer.eos_token
                encoded = self.tokenizer(
                    texts,
                    return_tensors="pt",
                    padding=len(texts) > 1,
                    # a chat template writes its own special tokens
                    add_special_tokens=not any(chats),
                )
            finally:
                self.tokenizer.padding_side = side
                if pad is None:
                    self.tokenizer.pad_token = None
        return {
            name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask") if name in encoded
        }

    def _render(self, messages: Sequence[Message]) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise CoreskipError("this tokenizer has no chat template: pass a text instead of messages")
        if not all("role" in m and "content" in m for m in messages):
            raise CoreskipError('every chat message needs a "role" and a "content"')
        return cast(str, self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    def _decode(self, ids: torch.Tensor) -> list[str]:
        return cast("list[str]", self.tokenizer.batch_decode(ids, skip_special_tokens=True))


class _Abandoned(Exception):
    """Ends a generation whose consumer went away."""


class _Pieces(TextIteratorStreamer):
    """A stream that ends its generation from within: a stopping criterion, which has to be asked about every token,
    would keep greedy text from being made several tokens a call (255 against 311 tok/s in int4)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.abandoned = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        if self.abandoned.is_set():
            raise _Abandoned
        super().put(value)  # type: ignore[no-untyped-call]


def _as_batch(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether there was just one. A chat is itself a list: of messages."""
    if isinstance(prompt, str):
        return [prompt], True
    items = list(prompt)
    if not items:
        raise CoreskipError("there is no prompt: give a text, a chat, or a list of them")
    if isinstance(items[0], Mapping):
        return [cast(Prompt, items)], True
    return cast("list[Prompt]", items), False


def _own_options(options: dict[str, Any]) -> tuple[int | None, list[str], dict[str, Any]]:
    options = dict(options)
    seed, stops = options.pop("seed", None), options.pop("stop_strings", None) or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    if any(not stop for stop in stops):
        raise CoreskipError("a stop string is empty")
    return seed, stops, options


def _cut(text: str, stops: list[str]) -> str:
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def _stop_before(pieces: Iterator[str], stops: list[str]) -> Iterator[str]:
    """The pieces up to the first stop string, holding back what may be the beginning of one."""
    held = ""
    for piece in pieces:
        held += piece
        cut = _cut(held, stops)
        if len(cut) < len(held):
            held = cut
            break
        safe = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if safe > 0:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
