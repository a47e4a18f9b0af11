"""Neurons of an ONNX decoder that each prompt chooses: their matrices are inputs of the graph, whole for the prompt,
and afterwards those of the chosen ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..predictors.errors import CoreskipError

MODEL = "model.onnx"
NEURONS = "neurons.safetensors"  # of an exported folder; without it nothing is chosen
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
Array = np.ndarray[Any, Any]


class NeuronInputs:
    """What the graph takes besides tokens, mask and cache.

    Args:
        whole: by layer, gate (where there is one) and up ``[hidden, width]`` and down ``[width, hidden]``.
        kept: by layer, how many neurons are chosen.
    """

    def __init__(self, whole: Mapping[int, Mapping[str, Array]], kept: Mapping[int, int]) -> None:
        self._whole, self._kept = whole, kept

    @classmethod
    def load(cls, folder: Path) -> NeuronInputs | None:
        """None where the folder's graph takes none.

        Raises:
            CoreskipError: the file is damaged.
        """
        path = folder / NEURONS
        if not path.exists():
            return None
        whole: dict[int, dict[str, Array]] = {}
        try:
            with safe_open(path, framework="numpy") as file:
                kept = {int(layer): int(count) for layer, count in json.loads(file.metadata()["kept"]).items()}
                named = set(file.keys())
                for layer in kept:
                    names = [name for name in ("gate", "up", "down") if f"{layer}.{name}" in named]
                    whole[layer] = {name: file.get_tensor(f"{layer}.{name}") for name in names}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CoreskipError(f"{path} is damaged ({error}): export the model again") from None
        return cls(whole, kept)

    def save(self, folder: Path) -> None:
        """Into a folder to `load` from."""
        tensors = {f"{layer}.{name}": array for layer, parts in self._whole.items() for name, array in parts.items()}
        save_file(tensors, folder / NEURONS, metadata={"kept": json.dumps(self._kept)})

    @property
    def nbytes(self) -> int:
        """Of all matrices."""
        return sum(array.nbytes for parts in self._whole.values() for array in parts.values())

    @property
    def nbytes_chosen(self) -> int:
        """Of those that a decode step reads."""
        parts = [(self._kept[layer], part) for layer, part in self._whole.items()]
        return sum(count * array.nbytes // len(part["down"]) for count, part in parts for array in part.values())

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs by which neurons are chosen."""
        return [output_of(layer) for layer in self._whole]

    def whole(self) -> dict[str, Array]:
        """The inputs with which a prompt is read, by name."""
        return {input_of(layer, name): array for layer, parts in self._whole.items() for name, array in parts.items()}

    def chosen(self, importance: Callable[[str], Array]) -> dict[str, Array]:
        """The inputs with which the text after it is generated.

        importance: by the output's name, what the prompt's pass has summed up, float32 ``[1, width]``; of equals the
        first are chosen, as `most_important` has it.
        """
        found: dict[str, Array] = {}
        for layer, parts in self._whole.items():
            scores = importance(output_of(layer)).reshape(-1)
            kept = np.sort(np.argsort(-scores, kind="stable")[: self._kept[layer]])
            for name, array in parts.items():
                some = array[kept] if name == "down" else array[:, kept]
                found[input_of(layer, name)] = np.ascontiguousarray(some)
        return found


class NeuronSession:
    """One text in ONNX Runtime after another: a prompt through the whole graph, then tokens through the chosen neurons.
    onnxruntime-genai (0.18) takes such inputs at a text's beginning alone.

    Keys and values lie in buffers that the graph reads and extends, as onnxruntime-genai has them.
    """

    def __init__(self, folder: Path, neurons: NeuronInputs, threads: int | None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._ort, self._neurons = ort, neurons
        self._session = ort.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
        given = self._session.get_inputs()
        self._caches = {i.name: (i.shape[1], i.shape[3], _TYPES[i.type]) for i in given if i.name.startswith("past")}

    def begin(self, ids: Sequence[int], room: int) -> Array:
        """Logits float ``[vocabulary]`` after a prompt; room: for how many tokens in all."""
        new, kinds = self._ort.OrtValue.ortvalue_from_numpy, self._caches.items()
        self._buffers = {name: new(np.zeros((1, heads, room, size), kind)) for name, (heads, size, kind) in kinds}
        self._length = 0
        wanted = ["logits", *self._neurons.outputs]
        self._bind(self._neurons.whole(), wanted)
        self._run(ids)
        found = dict(zip(wanted, self._binding.get_outputs()[len(self._buffers) :], strict=True))
        # of all lengths but the prompt's the outputs are alike: they are bound once
        self._bind(self._neurons.chosen(lambda name: found[name].numpy()), ["logits"])
        return _last(found["logits"])

    def step(self, token: int) -> Array:
        """Logits float ``[vocabulary]`` after one token more."""
        self._run([token])
        return _last(self._binding.get_outputs()[-1])

    def _bind(self, matrices: Mapping[str, Array], wanted: Sequence[str]) -> None:
        """Names what the next passes read and give."""
        self._binding = self._session.io_binding()
        for name, buffer in self._buffers.items():
            self._binding.bind_ortvalue_input(name, buffer)
            self._binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        self._matrices = {name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in matrices.items()}
        for name, value in self._matrices.items():
            self._binding.bind_ortvalue_input(name, value)
        for name in wanted:
            self._binding.bind_output(name)

    def _run(self, ids: Sequence[int]) -> None:
        self._length += len(ids)
        self._binding.bind_cpu_input("input_ids", np.asarray([ids], np.int64))
        self._binding.bind_cpu_input("attention_mask", np.ones((1, self._length), np.int64))
        self._session.run_with_iobinding(self._binding)


def _last(logits: Any) -> Array:
    return np.asarray(logits.numpy()[0, -1], np.float32)


def input_of(layer: int, name: str) -> str:
    """The graph's name of a matrix."""
    return f"layers.{layer}.mlp.{name}"


def output_of(layer: int) -> str:
    """The graph's name of what each neuron was worth to the tokens of a pass, float32 ``[batch, width]``."""
    return f"layers.{layer}.importance"
