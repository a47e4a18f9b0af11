"""The decode step of a GPU: captured once, replayed for every token.

There is no GPU here. `Recorded` stands in for a CUDA graph: it notes every operation that a step dispatches, and
replays them on the very same memory without any of the Python in between; a step that reads a value back to the host
cannot be recorded.
"""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_decode import ragged, some_tokens, teacher_forced
from test_policies import plan_with, some_policy
from tiny_models import greedy, plan_of, prompt, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

import coreskip
from coreskip.kernels import ops
from coreskip.predictors.plan import Plan
from coreskip.runtime import graph
from coreskip.runtime.wrap import runtime_of

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}


class HostRead(RuntimeError):
    """A GPU would have to be waited for."""


class Recorded(TorchDispatchMode):
    """A step's operations on fixed memory, as a CUDA graph holds them."""

    def __init__(self, step: graph.StaticStep) -> None:
        super().__init__()
        step()
        self._operations: list[tuple[Any, Any, Any, list[Tensor] | None]] = []
        before = step._holders()
        with self:
            self._logits = step()
        step._unused += step._holders() - before  # a graph holds addresses, this list holds tensors

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name.partition("::")[2] in WAITS:
            raise HostRead(f"{function} in a captured step")
        result = function(*args, **(kwargs or {}))
        given, made = (self._tensors(x) for x in ((args, kwargs), result))
        memory = {t.untyped_storage().data_ptr() for t in given}
        alias = any(t.untyped_storage().data_ptr() in memory for t in made)
        if function._schema.is_mutable or not alias:  # a view stays a view of the same memory
            self._operations.append((function, args, kwargs or {}, None if alias else made))
        return result

    @staticmethod
    def _tensors(tree: Any) -> list[Tensor]:
        return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]

    def __call__(self) -> Tensor:
        for function, args, kwargs, made in self._operations:
            result = function(*args, **kwargs)
            for old, new in zip(made or [], self._tensors(result), strict=False):
                old.copy_(new)
        return self._logits


@contextmanager
def captured(model: Any, plan: Plan | None = None, **options: Any) -> Iterator[graph.Graphs]:
    """The model wrapped, with its decode steps recorded where a GPU would capture them."""
    with coreskip.wrap(model, Plan.dense(model) if plan is None else plan, **options):
        graphs = runtime_of(model).graphs
        graphs.capture = Recorded
        yield graphs


@pytest.fixture(autouse=True)
def _through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the kernels of the CPU, like those of a GPU, are operations of a graph."""
    monkeypatch.setattr(ops, "_is_plain", lambda x: False)


def close(logits: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert logits.shape == expected.shape
    assert float((logits - expected).abs().max()) <= tolerance * float(expected.abs().max())


def modules_logits(model: Any, plan: Plan, *arguments: Any) -> Tensor:
    """Of the patched modules, called one by one."""
    with torch.no_grad(), coreskip.wrap(model, plan):
        runtime_of(model).decoder._refusal = "the native step is left out here"
        return teacher_forced(model, *arguments, each=1)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "mistral", "gemma2", "gemma3_text", "phi3", "opt", "gpt_neox", "falcon"]
)
def test_logits_are_the_modules_own_while_the_capacity_grows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_LEAST", 16)
    model = tiny(family)
    arguments = (*ragged(), some_tokens(2, 48))
    with torch.no_grad():
        expected = modules_logits(model, Plan.dense(model), *arguments)
        with captured(model) as graphs:
            close(teacher_forced(model, *arguments, each=1), expected)
            assert graphs.refusal is None
            assert [c.step.capacity for c in graphs._captured] == [16, 32, 64]
            close(teacher_forced(model, *arguments, each=1), expected)  # the same memory, another cache
            assert len(graphs._captured) == 3
