"""Text from a folder that was exported to ONNX, by onnxruntime-genai; where prompts choose neurons, by ONNX Runtime
itself."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..predictors.checks import path_of
from ..predictors.errors import CoreskipError, one_line
from .export_formats import ONNX_SETTINGS
from .figures import Figures
from .onnx_neurons import NeuronInputs, NeuronSession
from .pieces import Pieces


class OnnxEngine:
    """A folder of `export(..., to="onnx")`, or one that onnxruntime-genai's own builder made.

    Attributes:
        figures: of the last generation; None before.
        statistics: None: nothing is drafted.
        model: None: it is onnxruntime-genai's.

    Raises:
        CoreskipError: no such folder, or the package is not installed.
    """

    statistics = model = None

    def __init__(self, folder: str | os.PathLike[str], threads: int | None = None) -> None:
        path = path_of(folder, "the folder")
        if not (path / ONNX_SETTINGS).is_file():
            raise CoreskipError(f"{path} is no ONNX model: run `coreskip export --to onnx -o FOLDER`, and name that")
        neurons = NeuronInputs.load(path)
        package = "onnxruntime_genai" if neurons is None else "onnxruntime"
        if importlib.util.find_spec(package) is None:
            raise CoreskipError(f"such models are run by {package.replace('_', '-')}: pip install 'coreskip[export]'")
        self.figures: Figures | None = None
        settings = json.loads((path / ONNX_SETTINGS).read_text())["model"]
        self._most, ends = int(settings["context_length"]), settings["eos_token_id"]
        self._ends = set(ends if isinstance(ends, list) else [ends])
        with one_line(str(path)):
            self._source: Tokens = (
                GenaiTokens(open_model(path, threads))
                if neurons is None
                else SessionTokens(NeuronSession(path, neurons, threads), self._ends)
            )
            self._tokenizer = AutoTokenizer.from_pretrained(path)

    def __enter__(self) -> OnnxEngine:
        return self

    def __exit__(self, *_: object) -> None:
        del self._source

    def stream(
        self, message: Any, *, max_new_tokens: int = 64, seed: int | None = None, **options: Any
    ) -> Iterator[str]:
        """Pieces of the text that follows a prompt, or a list of messages.

        options: do_sample, temperature, top_p, top_k, as `Engine.generate` takes them.
        """
        begun, ids = time.perf_counter(), self._encoded(message)
        if len(ids) + max_new_tokens > self._most:
            raise CoreskipError(
                f"the model holds {self._most} tokens: {len(ids)} of the prompt leave fewer to generate"
            )
        pieces, count, first = Pieces(self._tokenizer), 0, None
        for token in self._source.tokens(ids, max_new_tokens, seed, options):
            count += 1
            first = time.perf_counter() - begun if first is None else first
            if token not in self._ends:
                yield pieces.add(token)
        yield pieces.end()
        self.figures = Figures(len(ids), count, time.perf_counter() - begun, first)

    def _encoded(self, message: Any) -> list[int]:
        if isinstance(message, str):
            return list(self._tokenizer(message).input_ids)
        found: Any = self._tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        return list(found["input_ids"])


class Tokens(Protocol):
    """Where tokens come from."""

    def tokens(self, ids: list[int], new: int, seed: int | None, options: dict[str, Any]) -> Iterator[int]:
        """Up to `new` tokens after a prompt's, or up to one that ends it, which comes, too. options: as `stream` has
        them."""


class GenaiTokens:
    """By onnxruntime-genai. model: its own, see `open_model`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def tokens(self, ids: list[int], new: int, seed: int | None, options: dict[str, Any]) -> Iterator[int]:
        import onnxruntime_genai as og

        search = og.GeneratorParams(self._model)
        seeded = {} if seed is None else {"random_seed": seed % 2**31}
        search.set_search_options(max_length=len(ids) + new, **options, **seeded)
        generator = og.Generator(self._model, search)
        generator.append_tokens(np.asarray([ids], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])


class SessionTokens:
    """By ONNX Runtime, where prompts choose neurons; sampled as transformers samples. ends: tokens that end a text."""

    def __init__(self, session: NeuronSession, ends: set[int]) -> None:
        self._session, self._ends = session, ends

    def tokens(self, ids: list[int], new: int, seed: int | None, options: dict[str, Any]) -> Iterator[int]:
        choose = _chooser(options, seed)
        logits = self._session.begin(ids, len(ids) + new)
        for made in range(1, new + 1):
            token = choose(torch.from_numpy(logits))
            yield token
            if token in self._ends or made == new:
                return
            logits = self._session.step(token)


def _chooser(options: dict[str, Any], seed: int | None) -> Callable[[torch.Tensor], int]:
    """From logits ``[vocabulary]`` to a token. options: as `Engine.generate` takes them."""
    if not options.get("do_sample"):
        return lambda logits: int(logits.argmax())
    warpers = LogitsProcessorList()
    if options.get("temperature", 1.0) != 1.0:
        warpers.append(TemperatureLogitsWarper(options["temperature"]))
    if options.get("top_k"):
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if options.get("top_p", 1.0) < 1.0:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    none: Any = torch.empty((1, 0), dtype=torch.int64)

    def choose(logits: torch.Tensor) -> int:
        given: Any = logits[None]
        scores: Any = warpers(none, given)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))

    return choose


def open_model(folder: Path, threads: int | None, settings: dict[str, Any] | None = None) -> Any:
    """onnxruntime-genai's model of a folder; threads: to compute with, None: all. settings: laid over its own."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    if settings is not None:
        config.overlay(json.dumps(settings))
    if threads is not None:
        overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(overlay))
    return og.Model(config)
