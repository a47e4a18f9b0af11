"""The folder of a packed model: what is in it, how it is sealed, and a model made of it.

``config.json``, generation settings and the tokenizer are files of transformers. ``packed.json`` says which matrices
are packed in which formats, what lies where in ``weights.bin`` (kernels/store.py), and what the folder was made from;
``plan/``, where there is one, is a Plan. Nothing is pickled, nothing of a matrix is read or copied before it is used:
the file is mapped, and processes that use a folder at once share its pages.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn

from ..kernels.groups import tile_shape
from ..kernels.ops import available
from ..kernels.packed import PackedLinear, padded
from ..kernels.residency import Residency
from ..kernels.store import DTYPES, Damaged, Store
from ..predictors.errors import CoreskipError, one_line, reason_of
from ..predictors.fingerprint import Fingerprint, keep
from ..predictors.plan import OF_PACKED, PACKED_AS
from ..predictors.sealed import unseal
from .packed_experts import hold_by_name
from .packed_layer import packed_modules, prepare
from .skeleton import cast_parameters, hold, left_empty, put, skeleton, unpack_modules

_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # formats of matrices without groups
DOCUMENT, WEIGHTS, PLAN = "packed.json", "weights.bin", OF_PACKED
FORMAT, VERSION = "coreskip.packed", 1
#: where a model has what calibrated its rounding
CALIBRATION = "_coreskip_calibration"
_SPARING = 1 << 20, 8 << 20, 8 << 20  # bytes of a piece, of all that are read ahead, and of what is unpacked at once
_readers: WeakKeyDictionary[nn.Module, Residency] = WeakKeyDictionary()
_roundings: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_stores: WeakKeyDictionary[nn.Module, Store] = WeakKeyDictionary()
_TRIES = 100  # of what a writer may undo; each takes as long as loading


def is_packed_folder(path: Path) -> bool:
    return (path / DOCUMENT).is_file()


def read_document(folder: Path) -> dict[str, Any]:
    """``packed.json``.

    Raises:
        CoreskipError: it is missing, truncated, edited, or newer than this version.
    """
    path = folder / DOCUMENT
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CoreskipError(f"{folder} is not a packed model: {DOCUMENT}: {error.strerror}") from None
    return unseal(
        text, path, kind=FORMAT, version=VERSION, foreign="that of a packed model", again="pack the model again"
    )


def plan_of(model: str | os.PathLike[str] | None) -> Path | None:
    """The Plan that a packed model has with it, where `model` is the path of one that has."""
    if model is None:
        return None
    place = Path(model) / PLAN
    return place if is_packed_folder(Path(model)) and place.is_dir() else None


def describe(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `coreskip show` prints of a packed model.

    Returns:
        ``{"class", "dtype", "weights", "calibration", "bytes", "formats"}``; ``formats`` has for each format of packed
        matrices how many there are and their bytes, and for ``dtype`` the same of all other tensors.

    Raises:
        CoreskipError: the folder is damaged, newer, or no packed model.
    """
    document = read_document(Path(folder))
    try:
        formats: dict[str, dict[str, int]] = {}
        tensors = dict(document["tensors"])
        parts = [entry["parts"] for entry in document["packed"].values()]
        parts += [list(entry["stacks"].values()) for entry in document.get("experts", {}).values()]
        for some in parts:
            for part in some:
                if part["tensor"] in tensors:  # head and embedding may share one
                    _count(formats, str(part["format"]), tensors.pop(part["tensor"]))
        for entry in tensors.values():
            _count(formats, str(entry["dtype"]), entry)
        figures = {name: document[name] for name in ("class", "dtype", "weights", "calibration", "bytes")}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CoreskipError(f"{folder} is not a well-formed packed model ({error}): pack the model again") from None
    return {**figures, "formats": formats}


def _count(formats: dict[str, dict[str, int]], name: str, entry: Mapping[str, Any]) -> None:
    found = formats.setdefault(name, {"tensors": 0, "bytes": 0})
    found["tensors"] += 1
    found["bytes"] += prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize


def table(found: Mapping[str, Any]) -> str:
    """`describe`'s result for people."""
    lines = [
        f"model         {found['class']}, {found['dtype']} between matrices",
        f"weights       {found['weights'] or 'as loaded'}, {found['bytes'] / 1e6:.1f} MB",
    ]
    if found["weights"] is not None:
        lines.append(f"rounding      {_rounding(found['calibration'])}")
    for name, figures in found["formats"].items():
        lines.append(f"  {name:12}{figures['tensors']:5} tensors {figures['bytes'] / 1e6:10.1f} MB")
    return "\n".join(lines)


def _rounding(text: Mapping[str, Any] | None) -> str:
    return "plainly rounded" if text is None else f"rounded with compensation, calibrated on {text['source']}"


def rounding_of(model: nn.Module) -> str | None:
    """How the weights of a model were rounded when it was packed; None where they were not, or it came from no packed
    model."""
    return _roundings.get(model)


def store_of(model: nn.Module) -> Store | None:
    """The file that a model's weights are mapped from; None where it came from no packed model."""
    return _stores.get(model)


def reader_of(model: nn.Module) -> Residency | None:
    """What reads the packed matrices of a model that was loaded sparingly, while nothing else does."""
    return _readers.get(model)


def load_packed(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    packed: bool | None = None,
    *,
    sparing: bool = False,
) -> tuple[Any, Any]:
    """The model in `folder`, in evaluation mode, and its tokenizer; unpacked on another device than the CPU, in
    processes without the native kernels, and where it shall not be `packed`.

    dtype: of what is computed between matrices; None: as it was when the model was packed.
    sparing: see `Store`.

    Raises:
        CoreskipError: the folder is damaged, newer, or made by another version of transformers that this one cannot
            read.
    """
    for _ in range(_TRIES):
        found = _stamp(folder)
        document = read_document(folder)
        try:
            model, tokenizer = _read(folder, document, sparing), _tokenizer(folder)
        except CoreskipError:
            if _stamp(folder) != found:
                continue
            raise
        if _stamp(folder) == found:
            return _prepared(model, document, dtype, device, packed), tokenizer
    raise CoreskipError(f"{folder} is replaced all the time")


def _stamp(folder: Path) -> tuple[int, int] | None:
    """What changes where another model takes the folder's place, one that was there before, too: what was read may be
    of both."""
    try:
        found = (folder / DOCUMENT).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _read(folder: Path, document: Mapping[str, Any], sparing: bool) -> Any:
    try:
        _check_files(folder, document["files"])
        contents = document["tensors"], document["bytes"], document["weights_checksum"]
        store = Store(folder / WEIGHTS, *contents, sparing=sparing)
        model = _skeleton(folder, document)
        plain = _fill(model, document, store, sparing)
        keep(model, _fingerprint(document["fingerprint"], store))
        _stores[model] = store
        if document["weights"] is not None:
            _roundings[model] = f"{document['weights']}, {_rounding(document['calibration'])}"
        if sparing:
            packed = [part["tensor"] for entry in document["packed"].values() for part in entry["parts"]] + plain
            _readers[model] = Residency(store, packed, *_SPARING, CoreskipError)
            _readers[model].open()
        return model
    except Damaged as error:
        raise CoreskipError(f"{folder / WEIGHTS} is damaged: {error}: pack the model again") from None
    except OSError as error:
        raise CoreskipError(f"cannot read the packed model {folder}: {error.strerror or error}") from None
    # whatever a sealed but senseless document trips over means one thing to the user
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CoreskipError(f"{folder} is not a well-formed packed model ({error}): pack the model again") from None


def file_sums(folder: Path) -> dict[str, str]:
    """SHA-256 of the folder's small files, by name: configuration and tokenizer."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in (DOCUMENT, WEIGHTS)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _check_files(folder: Path, expected: Mapping[str, str]) -> None:
    found = file_sums(folder)
    for name, checksum in expected.items():
        if found.get(name) != checksum:
            what = "is missing" if name not in found else "was edited or damaged"
            raise ValueError(f"its {name} {what}")


def _tokenizer(folder: Path) -> Any:
    with one_line(f"the tokenizer of {folder}"):
        return transformers.AutoTokenizer.from_pretrained(folder)


def _prepared(
    model: Any, document: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device, packed: bool | None
) -> Any:
    if dtype is not None:
        model = cast_parameters(model, dtype)
    if packed is False or device.type != "cpu" or available("cpu") is not None:
        unpack_modules(model)
        return model.to(device)
    if document["weights"] is not None and packed_modules(model):
        setattr(model, PACKED_AS, document["weights"])
        setattr(model, CALIBRATION, document["calibration"])
    prepare(model)
    return model


def _skeleton(folder: Path, document: Mapping[str, Any]) -> Any:
    """The model without its weights."""
    name = document["class"]
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"transformers {transformers.__version__} has no model {name}")
    try:
        config = cast(Any, cls).config_class.from_pretrained(folder)
        model = skeleton(cls, config, getattr(torch, document["dtype"]))
    except Exception as error:  # a damaged configuration surfaces as anything
        raise ValueError(f"its configuration: {reason_of(error)}") from error
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _fill(model: Any, document: Mapping[str, Any], store: Store, sparing: bool) -> list[str]:
    """sparing: whether matrices that are not packed are held as if they were: nobody then looks at their numbers but to
    multiply with them. Returns the names of these."""
    dtype = getattr(torch, document["dtype"])
    for name, entry in document["packed"].items():
        bias = store[entry["bias"]] if entry["bias"] is not None else None
        own = getattr(torch, entry["dtype"]) if "dtype" in entry else dtype
        hold(model, name, [_part(entry, store[part["tensor"]], part) for part in entry["parts"]], bias, own)
    for name, entry in document.get("experts", {}).items():
        stacks = {kind: _stack(part, store[part["tensor"]]) for kind, part in entry["stacks"].items()}
        hold_by_name(model, name, entry["layout"], stacks, dtype)
    held = dict[str, str]()
    for name, key in document["parameters"].items():
        put(model, name, nn.Parameter(store[key], requires_grad=False))
        if sparing and _can_be_held(model.get_submodule(name.rpartition(".")[0]), name):
            held[name] = key
    for name, key in document["buffers"].items():
        put(model, name, store[key])
    for name, first in document["tied"].items():
        put(model, name, model.get_parameter(first))
        if sparing and _can_be_held(model.get_submodule(name.rpartition(".")[0]), name):
            held[name] = document["parameters"][first]
    for name, key in held.items():
        place, weight = name.rpartition(".")[0], store[key]
        bias = model.get_submodule(place).bias
        hold(model, place, [PackedLinear(weight, weight.shape[1])], None if bias is None else bias.data, dtype)
    empty = left_empty(model, [*document["parameters"], *document["tied"]])
    if empty:
        raise ValueError(f"it has no weights for {empty[0]}")
    return list(held.values())


def _can_be_held(module: nn.Module, name: str) -> bool:
    """Whether this is the matrix of a linear whose rows kernels read where they lie."""
    if type(module) is not nn.Linear or not name.endswith(".weight"):
        return False
    return padded(module.in_features, module.weight.dtype) == module.in_features


def _part(entry: Mapping[str, Any], weight: Tensor, part: Mapping[str, Any]) -> PackedLinear:
    inputs, rows = entry["inputs"], part["rows"]
    if type(inputs) is not int or type(rows) is not int or inputs < 1 or rows < 1:
        raise ValueError("a packed matrix has no sensible shape")
    dtype = _HALVES.get(part["format"])
    if dtype is not None:
        if weight.dtype != dtype or tuple(weight.shape) != (rows, padded(inputs, dtype)):
            raise ValueError(f"a matrix of {rows} x {inputs} has another size than {part['format']} takes")
        return PackedLinear(weight, inputs)
    if weight.dtype != torch.uint8 or tuple(weight.shape) != tile_shape(part["format"], rows, inputs):
        raise ValueError(f"a packed matrix of {rows} x {inputs} has another size than {part['format']} takes")
    return PackedLinear(weight, inputs, rows=rows, whole=True)


def _stack(part: Mapping[str, Any], weights: Tensor) -> list[PackedLinear]:
    """The matrices of one kind of all experts of a layer."""
    return [_part(part, weight, part) for weight in weights]


def _fingerprint(saved: Mapping[str, Any], store: Store) -> Fingerprint:
    return Fingerprint(
        saved["model_type"], saved["vocab_size"], saved["hidden_size"], tuple(saved["intermediate_sizes"]),
        saved["activation"], saved["dtype"], store[saved["probes"]], tuple(saved.get("experts", ())),
    )  # fmt: skip
