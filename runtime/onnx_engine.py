"""Text from a folder that was exported to ONNX, by onnxruntime-genai."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from ..predictors.checks import path_of
from ..predictors.errors import CoreskipError, one_line
from .export_formats import ONNX_SETTINGS
from .figures import Figures


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
        if importlib.util.find_spec("onnxruntime_genai") is None:
            raise CoreskipError("ONNX models are run by onnxruntime-genai: pip install 'coreskip[export]'")
        self.figures: Figures | None = None
        with one_line(str(path)):
            self._model = open_model(path, threads)
            self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._most = int(json.loads((path / ONNX_SETTINGS).read_text())["model"]["context_length"])

    def __enter__(self) -> OnnxEngine:
        return self

    def __exit__(self, *_: object) -> None:
        del self._model

    def stream(
        self, message: Any, *, max_new_tokens: int = 64, seed: int | None = None, **options: Any
    ) -> Iterator[str]:
        """Pieces of the text that follows a prompt, or a list of messages.

        options: do_sample, temperature, top_p, top_k, as `Engine.generate` takes them.
        """
        import onnxruntime_genai as og

        begun, ids = time.perf_counter(), self._encoded(message)
        if len(ids) + max_new_tokens > self._most:
            raise CoreskipError(
                f"the model holds {self._most} tokens: {len(ids)} of the prompt leave fewer to generate"
            )
        search = og.GeneratorParams(self._model)
        seeded = {} if seed is None else {"random_seed": seed % 2**31}
        search.set_search_options(max_length=len(ids) + max_new_tokens, **options, **seeded)
        generator, pieces = og.Generator(self._model, search), og.Tokenizer(self._model).create_stream()
        generator.append_tokens(np.asarray([ids], np.int32))
        count, first = 0, None
        while not generator.is_done():
            generator.generate_next_token()
            count, token = count + 1, int(generator.get_next_tokens()[0])
            first = time.perf_counter() - begun if first is None else first
            if token not in self._tokenizer.all_special_ids:
                yield pieces.decode(token)
        self.figures = Figures(len(ids), count, time.perf_counter() - begun, first)

    def _encoded(self, message: Any) -> list[int]:
        if isinstance(message, str):
            return list(self._tokenizer(message).input_ids)
        found: Any = self._tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        return list(found["input_ids"])


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
