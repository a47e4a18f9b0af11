"""Finds linears whose matrix somebody reads besides their own forward: it has to stay where it is when others exist in
packed form alone (Jamba's mixers multiply by ``dt_proj.weight`` themselves)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..predictors.observe import inference

logger = logging.getLogger("coreskip")

_TOKENS = 4  # of a prompt; one more is decoded, for modules may take another way then


class _Watched(nn.Parameter):
    """A parameter that tells of functions that are given it."""

    told: Callable[[], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not getattr(func, "__name__", "").startswith("__get"):  # shape, dtype and device are no numbers
            for given in (*args, *(kwargs or {}).values()):
                if isinstance(given, _Watched):
                    given.told()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def read_elsewhere(model: Any, linears: Iterable[nn.Module]) -> set[nn.Module]:
    """Those of `linears` whose weight is read by others in a pass of a few tokens, as far as the model runs on tokens
    alone."""
    found, inside = set[nn.Module](), set[nn.Module]()
    plain = [module for module in dict.fromkeys(linears) if type(module) is nn.Linear and not module.weight.is_meta]
    with _watched(plain, found, inside), inference(model):
        try:
            ids = torch.arange(_TOKENS, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
            cache = model(input_ids=ids, use_cache=True).get("past_key_values")
            if cache is not None:
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        except Exception as error:  # whatever a model trips over that wants more than tokens
            logger.debug("who reads weights was seen in a part of a pass alone: %s", error)
    return found


@contextmanager
def _watched(linears: list[nn.Linear], found: set[nn.Module], inside: set[nn.Module]) -> Iterator[None]:
    before, handles = [module._parameters["weight"] for module in linears], list[Any]()
    try:
        for module, weight in zip(linears, before, strict=True):
            assert weight is not None
            watched = _Watched(weight.detach(), requires_grad=False)
            watched.told = lambda module=module: None if module in inside else found.add(module)  # type: ignore[misc]
            module._parameters["weight"] = watched
            handles.append(module.register_forward_pre_hook(lambda module, args: inside.add(module)))
            handles.append(module.register_forward_hook(lambda module, args, out: inside.discard(module)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, weight in zip(linears, before, strict=True):
            module._parameters["weight"] = weight
