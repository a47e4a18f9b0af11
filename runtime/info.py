"""What coreskip can do for a model: how its decode steps run, in which weight formats, and how fast by prediction."""

from __future__ import annotations

from typing import Any

from ..kernels.ops import available
from ..predictors.anatomy import Anatomy, check_model, dissect
from ..predictors.checks import AS_PACKED, WEIGHT_FORMATS
from ..predictors.errors import CoreskipError
from ..predictors.plan import Plan
from .calls import NotCovered
from .cost import bytes_per_token, predicted_seconds, read_bandwidth
from .figures import peak_memory
from .gpu_matrices import check_any_format
from .lower_cpu import refusal
from .packed_layer import PackedLayer, packed_layers, weight_bytes
from .span_reading import read_shared
from .wrap import make_way

AS_LOADED = "as loaded"


def describe(model: Any) -> dict[str, Any]:
    """What `coreskip info` prints.

    Returns:
        ``{"model_type", "parameters", "layers", "dtype", "device", "native", "reason", "bandwidth", "formats",
        "weight_bytes", "peak_memory"}``. ``reason`` says why decode steps do not run natively, or is None;
        ``bandwidth`` is in bytes per second; ``formats`` has for ``as loaded``, and for ``int4`` and ``int8`` or, of a
        packed model, ``packed``, either
        ``{"bytes_per_token", "tokens_per_second"}``, the latter predicted from the bytes and the bandwidth, or
        ``{"reason"}`` why the format cannot be used.
    """
    check_model(model)
    make_way(model)
    parameters = list({id(p): p for p in model.parameters()}.values())
    head = model.get_output_embeddings()
    if isinstance(head, PackedLayer) and model.config.get_text_config().tie_word_embeddings:
        parameters = [p for p in parameters if p is not head.weight]  # which is the embeddings' matrix, too
    found: dict[str, Any] = {
        "model_type": model.config.get_text_config().model_type,
        "parameters": sum(p.numel() for p in parameters),
        "layers": getattr(model.config.get_text_config(), "num_hidden_layers", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "weight_bytes": weight_bytes(model),
    }
    try:
        anatomy = dissect(model)
    except CoreskipError as error:
        named = {name: {"reason": str(error)} for name in _formats(model)}
        return {**found, "native": False, "reason": str(error), "bandwidth": None, "formats": named} | _memory(model)
    reason = available("cpu") or refusal(model, anatomy)
    if reason is None and model.device.type != "cpu":
        reason = f"native steps run on the CPU, and the model is on {model.device.type}"
    return {
        **found,
        "native": reason is None,
        "reason": reason,
        "native_halves": None if reason is None or available("cpu") else _native_halves(model, anatomy),
        "bandwidth": read_bandwidth(model.device.type),
        "formats": {name: _format(model, anatomy, name) for name in _formats(model)},
    } | _memory(model)


def _native_halves(model: Any, anatomy: Anatomy) -> list[int] | None:
    """How many of the layers' halves native steps may compute between the model's own modules, of how many; None: of
    none, or the model is elsewhere."""
    try:
        return None if model.device.type != "cpu" else list(next(read_shared(model, anatomy)).halves)
    except NotCovered:
        return None


def _formats(model: Any) -> tuple[str, ...]:
    return (AS_LOADED, AS_PACKED) if any(True for _ in packed_layers(model)) else (AS_LOADED, *WEIGHT_FORMATS)


def _memory(model: Any) -> dict[str, int]:
    return {"peak_memory": peak_memory(model.device)}


def _format(model: Any, anatomy: Any, name: str) -> dict[str, Any]:
    plan = Plan.dense(model, None if name == AS_LOADED else name)
    try:
        check_any_format(model, anatomy, plan)
    except CoreskipError as error:
        return {"reason": str(error)}
    seconds = predicted_seconds(model, plan, anatomy)
    return {"bytes_per_token": bytes_per_token(model, plan, anatomy), "tokens_per_second": 1 / seconds}


def table(found: dict[str, Any]) -> str:
    """`describe`'s result for people."""
    how = "native" if found["native"] else f"on the model's modules: {found['reason']}"
    if halves := found.get("native_halves"):
        how = f"{halves[0]} of {halves[1]} halves of layers native, the others on modules: {found['reason']}"
    rows = [
        (
            "model",
            f"{found['model_type']}, {found['parameters'] / 1e6:.1f} million parameters, {found['layers']} layers",
        ),
        ("weights", f"{found['dtype']}, {found['weight_bytes'] / 1e6:.0f} MB on {found['device']}"),
        ("decode steps", how),
    ]
    if found["bandwidth"] is not None:
        rows.append(("memory", f"read at {found['bandwidth'] / 1e9:.1f} GB/s"))
    rows.append(("peak memory", f"{found['peak_memory'] / 1e9:.2f} GB so far"))
    lines = [f"{name:14}{value}" for name, value in rows]
    lines += ["", f"{'weights':14}MB/token  predicted tok/s"]
    for name, figures in found["formats"].items():
        if "reason" in figures:
            lines.append(f"{name:14}{figures['reason']}")
        else:
            lines.append(f"{name:14}{figures['bytes_per_token'] / 1e6:8.1f}  {figures['tokens_per_second']:15.0f}")
    return "\n".join(lines)
