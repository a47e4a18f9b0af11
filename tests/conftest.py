"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import tiny

from coreskip.kernels import cpu, ops

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing loads from a hub in tests


@pytest.fixture(params=[] if ops.available("cpu") else cpu.supported())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, in use for the length of the test."""
    before = cpu.active()
    cpu.use(request.param)
    yield request.param
    cpu.use(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llama() -> Any:
    return tiny("llama")


@pytest.fixture(scope="session")
def embedded() -> tuple[Any, Any]:
    """The embedded SmolLM2-135M-Instruct in fp32, on the CPU."""
    from coreskip.runtime.load import load

    return load(device="cpu")


@pytest.fixture(autouse=True)
def _unwrapped_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """The embedded model is shared by tests: none may leave it wrapped."""
    yield
    if "embedded" in request.fixturenames:
        from coreskip.runtime.wrap import is_wrapped

        assert not is_wrapped(request.getfixturevalue("embedded")[0])
