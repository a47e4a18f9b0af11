"""A smaller model as a plain checkpoint, which transformers loads with no code of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .export_weights import Smaller
from .skeleton import cast_parameters

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Checkpoint:
    """config.json, safetensors, generation settings and tokenizer of a smaller model.

    weights: dtype of the parameters; None: the model's own.
    """

    #: how MLPs are padded whose layers keep different numbers of neurons
    PAD = "model"
    CHOOSES = False

    def __init__(self, found: Smaller, tokenizer: Any, weights: str | None) -> None:
        self._found, self._tokenizer = found, tokenizer
        self.weights = weights or str(found.model.dtype).removeprefix("torch.")
        self.notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> float:
        """Of the weights."""
        return self._found.numbers * WEIGHTS[self.weights].itemsize

    @property
    def usage(self) -> str:
        """Python that loads it."""
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        )

    def write(self, folder: Path, progress: bool) -> None:
        """Into an empty folder. Raises what transformers and the disk raise."""
        self._tokenizer.save_pretrained(folder)
        model = self._found.model
        if model.dtype != WEIGHTS[self.weights]:
            cast_parameters(model, WEIGHTS[self.weights])
        shown = logging.is_progress_bar_enabled()
        if not progress:
            logging.disable_progress_bar()
        try:
            model.save_pretrained(folder)
        finally:
            if shown:
                logging.enable_progress_bar()
