"""Compiles the Triton kernels that calls launch for a GPU that is not here, down to its machine code.

For a process without TRITON_INTERPRET.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from coreskip.kernels import gpu_parts, gpu_step

_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
    torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip

Compiled = list[tuple[str, Any]]


def compiled(call: Callable[[], Any], capability: int = 90) -> Compiled:
    """The name of each kernel that `call` launches, and what became of it; nothing is run, no result filled in."""
    found: Compiled = []

    def run(kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert all(0 < n <= limit for n, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=False)), grid
        found.append((kernel.fn.__name__, _compile(kernel, arguments, dict(options), capability)))

    before = gpu_parts.run, gpu_step._kernels
    gpu_parts.run, gpu_step._kernels = run, lambda name, x: gpu_step._module(name)
    try:
        call()
    finally:
        gpu_parts.run, gpu_step._kernels = before
    return found


def _compile(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], capability: int) -> Any:
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False)) | {k: options.pop(k) for k in names if k in options}
    assert set(given) == set(names), set(names) ^ set(given)
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = given[name]
        signature[name] = "constexpr"
        if kernel.params[i].is_constexpr or value is None or (isinstance(value, int) and value == 1):
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            assert isinstance(value, float), (name, value)
            signature[name] = "fp32"
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
