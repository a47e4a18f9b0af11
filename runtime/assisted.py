"""Assisted decoding under a plan: the text is the plan's own, whichever assistant drafts candidate tokens.

transformers reads the prompt and the first candidates in one pass. Under a plan the prompt is prefill and the
candidates are decode, each phase with neurons or weights of its own, and the prompt alone chooses neurons. The first
pass is therefore split into two, one over the prompt and one over the candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..predictors.errors import CoreskipError
from .phases import prefilling

#: Arguments of ``_assisted_decoding`` that are not meant for the model's forward.
_NOT_FOR_FORWARD = {
    *("logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer", "inputs_tensor"),
    *("assistant_model", "assistant_tokenizer", "tokenizer"),
}


def decode(method: Callable[..., Any], model: Any, ids: Tensor, arguments: dict[str, Any]) -> Any:
    """What `method`, ``_assisted_decoding`` of a wrapped model's own class, returns for `ids` ``[1, length]`` and its
    other arguments by name.

    Raises:
        CoreskipError: attentions or hidden states are asked for, which transformers cuts out of its first pass.
    """
    config = arguments["generation_config"]
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise CoreskipError(
            "under a plan, assisted decoding gives no attentions or hidden states: leave out output_attentions and "
            "output_hidden_states, or the assistant"
        )
    model_kwargs = {name: value for name, value in arguments.items() if name not in _NOT_FOR_FORWARD}
    return method(_SplitFirstPass(model, ids, config, model_kwargs), ids, **arguments)


class _SplitFirstPass:
    """The model as ``_assisted_decoding`` alone sees it: the first pass is split into one over the prompt and one over
    the candidates. Every other call and attribute is the model's."""

    def __init__(self, model: Any, prompt: Tensor, config: Any, model_kwargs: dict[str, Any]) -> None:
        self._model, self._prompt, self._config, self._prompt_kwargs = model, prompt, config, model_kwargs
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def prepare_inputs_for_generation(self, ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(ids, **kwargs)
        if not self._begun:
            self._candidates, self._kwargs, self._prepared = ids, kwargs, set(inputs)
        return inputs

    def __call__(self, **inputs: Any) -> Any:
        if self._begun:
            return self._model(**inputs)
        self._begun = True
        count = self._candidates.shape[1] - self._prompt.shape[1]
        if (
            count == 0 and set(inputs) - self._prepared
        ):  # an assistant that drafts from the model's outputs asks for more outputs
            with prefilling(self._prompt_kwargs.get("attention_mask")):
                return self._model(**inputs)
        prompt = self._model._prefill(self._prompt, self._config, dict(self._prompt_kwargs))
        if count == 0:
            return prompt
        changed = {"past_key_values": prompt.past_key_values, "next_sequence_length": count}
        kwargs = {**self._kwargs, **changed, "is_first_iteration": False}
        more = self._model.prepare_inputs_for_generation(self._candidates, **kwargs)
        if "logits_to_keep" in more:
            more["logits_to_keep"] = count
        output = self._model(**more, return_dict=True)
        output.logits = torch.cat([prompt.logits[:, -1:], output.logits[:, -count:]], dim=1)
        return output
