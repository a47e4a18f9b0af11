"""A smaller model as an ONNX decoder with the settings and the tokenizer that onnxruntime-genai reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch

from ..predictors.anatomy import shape_of
from ..predictors.errors import CoreskipError
from ..predictors.observe import inference
from .calls import NotCovered
from .export_formats import ONNX_SETTINGS
from .export_onnx_graph import Decoder, make_fast, rounded
from .export_spec import attention_of, plain_spec
from .export_weights import Smaller
from .onnx_neurons import MODEL, NeuronInputs, input_of
from .skeleton import cast_parameters
from .spec import BrickSpec, LinearSpec, ModelSpec

DATA = "model.onnx.data"
_BYTES = {"float32": 4.0, "float16": 2.0, "int4": 0.7}  # of a number, about; LM heads and embeddings have 8 bits
_PROBE = 8  # tokens on which ONNX Runtime is compared with the smaller model
#: of the logits' norm: how far apart the two may be, by rounding
_TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "int4": 1e-3}


class OnnxFolder:
    """model.onnx, its data, genai_config.json and tokenizer of a smaller model.

    Raises:
        CoreskipError: the description, or ONNX Runtime's operators, do not know the architecture.
    """

    PAD = "none"
    CHOOSES = True

    def __init__(self, found: Smaller, tokenizer: Any, weights: str | None) -> None:
        self._found, self._tokenizer = found, tokenizer
        self.weights = weights or "float32"
        self.notes: tuple[str, ...] = ()
        text = found.model.config.get_text_config()
        self._positions = int(getattr(text, "max_position_embeddings", 0) or 2048)
        try:
            self._spec = plain_spec(found.model)
            self._decoder = Decoder(
                self._spec,
                found.layers,
                heads=text.num_attention_heads,
                weights=self.weights,
                positions=self._positions,
            )
        except NotCovered as reason:
            raise CoreskipError(f"{text.model_type!r} models cannot be written as ONNX: {reason}") from None
        kept = {new: left.chosen for new, left in enumerate(found.layers) if left.chosen}
        self._neurons = NeuronInputs(self._decoder.neurons, kept) if kept else None
        if kept:
            self.notes = (
                "Matrices of MLPs are inputs of the graph, in neurons.safetensors: whole for a prompt, then those of "
                "the neurons that it makes most of. `coreskip generate --backend onnxruntime` hands them over.",
            )

    @property
    def nbytes(self) -> float:
        """Of the weights, about."""
        return self._found.numbers * _BYTES[self.weights]

    @property
    def usage(self) -> str:
        """How it is run."""
        return 'coreskip generate --backend onnxruntime FOLDER -p "Once upon a time"'

    def write(self, folder: Path, progress: bool) -> None:
        """Into an empty folder.

        Raises:
            CoreskipError: ONNX Runtime computes something else than the model.
        """
        self._tokenizer.save_pretrained(folder)
        ir.save(self._decoder.model(), folder / MODEL, external_data=DATA)
        if self._neurons is not None:
            self._neurons.save(folder)
        (folder / ONNX_SETTINGS).write_text(json.dumps(self._settings(), indent=1))
        self._check(folder / MODEL)
        if self.weights == "int4":
            make_fast(folder / MODEL)  # of a model with outliers what it computes then may be far off

    def _settings(self) -> dict[str, Any]:
        """What onnxruntime-genai has to know of the graph and of its texts."""
        attention, text = attention_of(self._spec.layers[0]), self._found.model.config.get_text_config()
        ends = getattr(self._found.model.generation_config, "eos_token_id", None)
        ends = text.eos_token_id if ends is None else ends
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        # where nothing ends a text, it takes what pads for an end: a token that is hardly ever generated
        pad = text.pad_token_id if ends and text.pad_token_id is not None else (ends or [text.vocab_size - 1])[0]
        past, present = "past_key_values.%d", "present.%d"
        decoder = {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": MODEL,
            "head_size": attention.head_dim,
            "hidden_size": text.hidden_size,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": _kv_heads(self._spec),
            "num_hidden_layers": self._decoder.caches,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": f"{past}.key",
                "past_value_names": f"{past}.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": f"{present}.key",
                "present_value_names": f"{present}.value",
            },
        }
        model = {
            # of the types that it knows this is the one for a decoder with these inputs and nothing besides
            "type": "llama",
            "bos_token_id": text.bos_token_id if text.bos_token_id is not None else pad,
            "eos_token_id": ends,
            "pad_token_id": pad,
            "vocab_size": text.vocab_size,
            "context_length": self._positions,
            "decoder": decoder,
        }
        search = {"do_sample": False, "max_length": self._positions, "past_present_share_buffer": True}
        return {"model": model, "search": search}

    def _check(self, path: Path) -> None:
        """Compares a prompt and a decode step in ONNX Runtime with the model's own."""
        from onnxruntime import InferenceSession, SessionOptions

        options = SessionOptions()
        options.log_severity_level = 4  # what it says of errors is said once, by us
        session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        vocabulary = self._spec.embedding.shape[0]
        ids = torch.randint(vocabulary, (1, _PROBE), generator=torch.Generator().manual_seed(0))
        cast_parameters(self._found.model, torch.float32)  # as the graph computes between matrices
        if self.weights == "int4":
            self._round()
        chosen: list[dict[str, Any]] = []
        logits = decoded(session, ids.numpy(), _PROBE - 2, self._neurons, chosen.append)
        got = torch.from_numpy(logits.astype(np.float32))
        with inference(self._found.model):
            wanted = self._wanted(ids, *chosen)
        off = float((got - wanted).norm() / wanted.norm())
        if not off <= _TOLERANCE[self.weights]:
            kind = self._found.model.config.get_text_config().model_type
            raise CoreskipError(
                f"{kind!r} models cannot be written as ONNX: ONNX Runtime's logits are off by {off:.1%} of their size"
            )

    def _wanted(self, ids: torch.Tensor, chosen: dict[str, Any] | None = None) -> torch.Tensor:
        """The smaller model's own logits. chosen: matrices with which it goes on after the prompt."""
        model = self._found.model
        if chosen is None:
            return cast(torch.Tensor, model(input_ids=ids).logits.float())
        out = model(input_ids=ids[:, :-2], use_cache=True)
        logits, cache = [out.logits], out.past_key_values
        for index, layer in enumerate(self._spec.layers):
            for linear, names in _matrices(layer.bricks[0], self._decoder.neurons.get(index, {})):
                rows = [torch.from_numpy(chosen[input_of(index, name)]).t() for name in names]
                module: Any = linear.module
                module.weight = torch.nn.Parameter(torch.cat(rows).float().contiguous(), requires_grad=False)
        logits += [model(input_ids=token, past_key_values=cache).logits for token in ids[:, -2:].split(1, 1)]
        return torch.cat(logits, 1).float()

    def _round(self) -> None:
        """Gives the smaller model the numbers that were written."""
        modules: dict[Any, int] = {linear.module: 4 for linear in self._spec.linears}
        modules |= {self._spec.head.module: 8, self._spec.table: 8}
        for module, bits in modules.items():
            weight = module.weight.detach()
            module.weight = torch.nn.Parameter(rounded(weight, bits), requires_grad=False)


def _matrices(brick: BrickSpec, chosen: Mapping[str, Any]) -> Iterator[tuple[LinearSpec, tuple[str, ...]]]:
    """The linears of an MLP and which of the matrices that were chosen each holds; none where none were."""
    if chosen:
        if brick.gate is not None:
            yield brick.gate, ("gate",)
        yield brick.up, ("gate", "up") if brick.stacked else ("up",)
        yield brick.down, ("down",)


def decoded(
    session: Any,
    ids: np.ndarray[Any, Any],
    prompt: int,
    neurons: NeuronInputs | None = None,
    see: Callable[[dict[str, Any]], None] = lambda chosen: None,
) -> np.ndarray[Any, Any]:
    """Logits ``[1, tokens, vocabulary]`` of ids int64 ``[1, tokens]``: the first `prompt` in one pass, then one a
    step. neurons: matrices that the graph takes as inputs; see: is given those that the prompt chose."""
    given = {entry.name: entry for entry in session.get_inputs() if entry.name.startswith("past")}
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    cache = {n: np.zeros((1, e.shape[1], 0, e.shape[3]), kinds[e.type]) for n, e in given.items()}
    names = [entry.name for entry in session.get_outputs()]
    logits, matrices = [], {} if neurons is None else neurons.whole()
    for first, last in [(0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))]:
        feeds = {"input_ids": ids[:, first:last], "attention_mask": np.ones((1, last), np.int64)}
        outputs = dict(zip(names, session.run(None, {**feeds, **cache, **matrices}), strict=True))
        logits.append(outputs["logits"])
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        if neurons is not None and last == prompt:
            matrices = neurons.chosen(outputs.__getitem__)
            see(matrices)
    return np.concatenate(logits, 1)


def _kv_heads(spec: ModelSpec) -> int:
    attention = attention_of(spec.layers[0])
    first, *others = attention.inputs
    rows = first.rows[1] if first.rows is not None else shape_of(others[0].module)[0]
    return rows // attention.head_dim
