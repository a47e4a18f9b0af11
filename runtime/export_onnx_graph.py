"""A described decoder as an ONNX graph, in the operators that ONNX Runtime's kernels for generation know.

Standard ones where there are any; com.microsoft's for grouped-query attention over a KV cache, whose rotary tables are
its inputs, and for matrices in 4 or 8 bits. Inputs and outputs are named as onnxruntime-genai expects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..predictors.anatomy import rows_of
from .calls import NotCovered
from .export_spec import attention_of
from .export_weights import RemainingLayer
from .onnx_neurons import input_of, output_of
from .rotary_tables import RotaryTables, Table
from .spec import AttentionSpec, BrickSpec, LayerSpec, LinearSpec, ModelSpec, NormSpec

OPSET, IR_VERSION = 22, 10
_MS = "com.microsoft"
_PAIRS = 8
_BLOCK = 32  # inputs of a group of integers with one scale
_EXACT, _FAST = 1, 4  # of inputs of products with blocks: float32, or 8 bits in blocks, several times as fast
Rows = tuple[Tensor, Tensor | None]  # a matrix [outputs, inputs] and its bias


class Decoder:
    """The graph of one decoder.

    Args:
        layers: which halves there are of each of the spec's layers; what is skipped is left out.
        weights: float32, float16, or int4: blocks of 4 bits, embeddings and LM head of 8, the rest float32.
        positions: of the longest text.

    Raises:
        NotCovered: something has no operator.
    """

    def __init__(
        self, spec: ModelSpec, layers: Sequence[RemainingLayer], *, heads: int, weights: str, positions: int
    ) -> None:
        self._spec, self._heads, self._weights = spec, heads, weights
        self._kind = ir.DataType.FLOAT16 if weights == "float16" else ir.DataType.FLOAT
        self._dtype: Any = np.float16 if weights == "float16" else np.float32
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._inputs, self._outputs = list[ir.Value](), list[ir.Value]()
        self.neurons: dict[int, dict[str, np.ndarray[Any, Any]]] = {}  # by layer, matrices that are inputs
        self.caches = 0  # of keys and values: a layer without attention has none
        rotary = RotaryTables(spec)
        rotary.reach(positions)
        self._tables, self._positions = rotary.tables(), positions
        self._build(layers)

    def model(self) -> ir.Model:
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, _MS: 1},
            name="decoder",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="coreskip")

    # --- the decoder

    def _build(self, layers: Sequence[RemainingLayer]) -> None:
        spec = self._spec
        ids = self._input("input_ids", ir.DataType.INT64, ["batch", "length"])
        mask = self._input("attention_mask", ir.DataType.INT64, ["batch", "total"])
        self._lengths = self._lengths_of(mask)
        x, y = self._embedded(ids), None
        for index, (layer, left) in enumerate(zip(spec.layers, layers, strict=True)):
            x, y = self._layer(index, layer, left, x, y)
        last, _ = self._read("norm", spec.norm, x, y)
        logits = self._linear("lm_head", last, [_rows(spec.head)], bits=8)
        if spec.logit_scale != 1.0:
            logits = self._op("Mul", logits, self._number("logit_scale", spec.logit_scale))
        if spec.logit_softcap:
            cap = self._number("logit_softcap", spec.logit_softcap)
            logits = self._op("Mul", self._op("Tanh", self._op("Div", logits, cap)), cap)
        self._output(logits, "logits", ["batch", "length", spec.embedding.shape[0]])

    def _lengths_of(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """What grouped-query attention asks for: of each sequence its tokens less one, and of the longest all."""
        one, axis = self._integers("one", [1]), self._integers("last_axis", 1)
        last = self._op("Sub", self._op("ReduceSum", mask, one, keepdims=0), one)
        total = self._op("Gather", self._op("Shape", mask), axis, axis=0)
        int32 = int(ir.DataType.INT32)
        return self._op("Cast", last, to=int32), self._op("Cast", total, to=int32)

    def _embedded(self, ids: ir.Value) -> ir.Value:
        spec, name, rows = self._spec, "embed_tokens", self._spec.embedding
        if self._weights == "int4":
            if rows.shape[1] % _BLOCK:
                raise NotCovered(f"in int4 its hidden size has to be a multiple of {_BLOCK}")
            data, scales, zeros = _blocks(rows, 8)
            flat = self._constant(f"{name}.quantized", data.reshape(len(data), -1))
            parts = flat, ids, self._constant(f"{name}.scales", scales), self._constant(f"{name}.zeros", zeros)
            way: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": _BLOCK, "bits": 8}
            x = self._op("GatherBlockQuantized", *parts, domain=_MS, **way)
        else:
            x = self._op("Gather", self._weight(f"{name}.weight", rows), ids, axis=0)
        scale = spec.embedding_scale
        assert scale is not None  # the weights are there
        return x if scale == 1.0 else self._op("Mul", x, self._number("embedding_scale", scale))

    def _layer(
        self, index: int, layer: LayerSpec, left: RemainingLayer, x: ir.Value, y: ir.Value | None
    ) -> tuple[ir.Value, ir.Value | None]:
        """The residual stream comes and goes as a sum that is still to be taken: norms take it on the way."""
        name, after = f"layers.{index}", layer.residual_scale
        if left.attention:
            read, x = self._read(f"{name}.attention_in", layer.attention_in, x, y)
            y = self._attention(name, attention_of(layer), read, self._tables[index])
            y = self._scaled(self._norm(f"{name}.attention_out", layer.attention_out, y), after)
        if not left.mlp:
            return x, y
        (brick,), before = layer.bricks, y
        beside = layer.parallel and left.attention
        read, x = self._read(f"{name}.mlp_in", layer.mlp_in, x, None if beside else y)
        y = self._chosen_mlp(index, brick, read) if left.chosen else self._mlp(f"{name}.mlp", brick, read)
        y = self._scaled(self._norm(f"{name}.mlp_out", layer.mlp_out, y), after)
        return x, self._op("Add", before, y) if beside else y

    def _read(self, name: str, norm: NormSpec | None, x: ir.Value, y: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """norm(x + y), and x + y."""
        if y is None:
            return self._norm(name, norm, x), x
        if norm is None or norm.kind != "rms":
            x = self._op("Add", x, y)
            return self._norm(name, norm, x), x
        found = self._op(
            "SkipSimplifiedLayerNormalization", x, y, self._factor(name, norm), domain=_MS, count=4, epsilon=norm.eps
        )
        found[1].name = found[2].name = ""  # statistics that nobody asks for
        return found[0], found[3]

    def _scaled(self, y: ir.Value, scale: float) -> ir.Value:
        return y if scale == 1.0 else self._op("Mul", y, self._number(f"residual_scale.{scale}", scale))

    def _norm(self, name: str, norm: NormSpec | None, x: ir.Value) -> ir.Value:
        if norm is None:
            return x
        factor = self._factor(name, norm)
        if norm.kind == "rms":
            return self._op("SimplifiedLayerNormalization", x, factor, axis=-1, epsilon=norm.eps, stash_type=1)
        biases = [] if norm.bias is None else [self._weight(f"{name}.bias", norm.bias.detach())]
        return self._op("LayerNormalization", x, factor, *biases, axis=-1, epsilon=norm.eps)

    def _factor(self, name: str, norm: NormSpec) -> ir.Value:
        """What a norm's outputs are multiplied by."""
        weight = torch.full((norm.size,), norm.offset)
        if norm.weight is not None:
            weight = norm.slope * norm.weight.detach().float() + norm.offset
        return self._weight(f"{name}.weight", weight)

    # --- attention

    def _attention(self, name: str, attention: AttentionSpec, x: ir.Value, table: Table | None) -> ir.Value:
        rows = [part for linear in attention.inputs for part in _parts(linear)]
        sizes = [len(weight) for weight, _ in rows]
        joined = self._linear(f"{name}.qkv", x, rows)
        q, k, v = joined, None, None  # side by side, as the operator takes them, too
        if attention.q_norm is not None or attention.k_norm is not None:
            q, k, v = self._op("Split", joined, self._integers(f"{name}.sizes", sizes), count=3, axis=-1)
            q = self._head_norm(f"{name}.q_norm", attention.q_norm, q, attention.head_dim)
            k = self._head_norm(f"{name}.k_norm", attention.k_norm, k, attention.head_dim)
        kv_heads = sizes[1] // attention.head_dim
        past = self._cache(kv_heads, attention.head_dim)
        rotary, way = self._rotation(attention, table)
        way |= {"num_heads": self._heads, "kv_num_heads": kv_heads, "scale": attention.scale}
        if attention.softcap:
            way["softcap"] = attention.softcap
        if attention.window:
            way["local_window_size"] = attention.window
        inputs = (q, k, v, *past, *self._lengths, *rotary)
        y, *present = self._op("GroupQueryAttention", *inputs, domain=_MS, count=3, **way)
        shape = ["batch", kv_heads, "total", attention.head_dim]
        for value, kind in zip(present, ("key", "value"), strict=True):
            self._output(value, f"present.{self.caches}.{kind}", shape)
        self.caches += 1
        return self._linear(f"{name}.o", y, [_rows(attention.output)])

    def _cache(self, heads: int, size: int) -> list[ir.Value]:
        shape = ["batch", heads, "past", size]
        return [self._input(f"past_key_values.{self.caches}.{kind}", self._kind, shape) for kind in ("key", "value")]

    def _head_norm(self, name: str, norm: NormSpec | None, x: ir.Value, head_dim: int) -> ir.Value:
        """Over each head, or over all of a projection's outputs."""
        if norm is None or norm.size != head_dim:
            return self._norm(name, norm, x)
        heads = self._op("Reshape", x, self._integers(f"heads.{head_dim}", [0, 0, -1, head_dim]))
        return self._op("Reshape", self._norm(name, norm, heads), self._integers("joined", [0, 0, -1]))

    def _rotation(self, attention: AttentionSpec, table: Table | None) -> tuple[list[ir.Value], dict[str, Any]]:
        if table is None:
            return [], {"do_rotary": 0}
        cos, sin = (each[: self._positions] for each in table)
        half = cos.shape[1] // 2
        if half % _PAIRS:
            raise NotCovered(f"ONNX Runtime turns multiples of {_PAIRS} pairs of a head, not {half}")
        if not torch.equal(cos[:, :half], cos[:, half:]):
            raise NotCovered("its rotary positions turn the two of a pair by different angles")
        name = f"rotary.{attention.rotation or 'all'}"
        tables = [self._weight(f"{name}.{part}", t[:, :half]) for part, t in (("cos", cos), ("sin", sin))]
        return tables, {"do_rotary": 1, "rotary_interleaved": int(attention.paired)}

    # --- MLPs

    def _mlp(self, name: str, brick: BrickSpec, x: ir.Value) -> ir.Value:
        rows = [part for linear in brick.linears[:-1] for part in _parts(linear)]
        names = ("up",) if len(rows) == 1 else ("gate", "up")
        *gates, up = (self._linear(f"{name}.{n}", x, [part]) for n, part in zip(names, rows, strict=True))
        h = self._op("Mul", self._act(brick.act, gates[0]), up) if gates else self._act(brick.act, up)
        return self._linear(f"{name}.down", h, [_rows(brick.down)])

    def _chosen_mlp(self, layer: int, brick: BrickSpec, x: ir.Value) -> ir.Value:
        """An MLP whose matrices are inputs, of as many neurons as they have, and what each of these was worth."""
        rows = [part for linear in brick.linears[:-1] for part in _parts(linear)]
        if self._weights == "int4":
            raise NotCovered("neurons in 4-bit blocks cannot be chosen by a prompt; write float32 or float16")
        if any(bias is not None for _, bias in rows):
            raise NotCovered("its MLPs have biases, of which a prompt would choose some")
        names = ("up",) if len(rows) == 1 else ("gate", "up")
        *gates, up = (
            self._op("MatMul", x, self._matrix(layer, n, weight.t()))
            for n, (weight, _) in zip(names, rows, strict=True)
        )
        h = self._op("Mul", self._act(brick.act, gates[0]), up) if gates else self._act(brick.act, up)
        self._importance(layer, h)
        weight, bias = _rows(brick.down)
        y = self._op("MatMul", h, self._matrix(layer, "down", weight.t()))
        return y if bias is None else self._op("Add", y, self._weight(f"layers.{layer}.mlp.down.bias", bias))

    def _matrix(self, layer: int, name: str, rows: Tensor) -> ir.Value:
        """A matrix of an MLP as an input, with any number of neurons."""
        array = np.ascontiguousarray(rows.detach().float().numpy().astype(self._dtype))
        self.neurons.setdefault(layer, {})[name] = array
        shape = [f"neurons.{layer}", array.shape[1]] if name == "down" else [array.shape[0], f"neurons.{layer}"]
        return self._input(input_of(layer, name), self._kind, shape)

    def _importance(self, layer: int, h: ir.Value) -> None:
        """GRIFFIN's score (arXiv 2404.01365, section 4), squared: the sum over tokens of (a / ||a||)^2."""
        if self._kind != ir.DataType.FLOAT:
            h = self._op("Cast", h, to=int(ir.DataType.FLOAT))
        size = self._op("ReduceL2", h, self._integers("of_neurons", [-1]), keepdims=1)
        least = self._constant("least_size", np.asarray(np.finfo(np.float32).tiny, np.float32))
        parts = self._op("Div", h, self._op("Max", size, least))
        found = self._op("ReduceSumSquare", parts, self._integers("of_tokens", [1]), keepdims=0)
        found.name, found.shape = output_of(layer), ir.Shape(["batch", f"neurons.{layer}"])
        found.type = ir.TensorType(ir.DataType.FLOAT)
        self._outputs.append(found)

    def _act(self, act: str, x: ir.Value) -> ir.Value:
        if act == "silu":
            return self._op("Mul", x, self._op("Sigmoid", x))
        if act in ("gelu", "gelu_tanh"):
            return self._op("Gelu", x, approximate="tanh" if act == "gelu_tanh" else "none")
        y = self._op("Relu", x)
        return self._op("Mul", y, y) if act == "relu2" else y

    def _linear(self, name: str, x: ir.Value, parts: Sequence[Rows], bits: int = 4) -> ir.Value:
        """x times the matrices of `parts`, outputs side by side; bits: where weights are int4."""
        weight = torch.cat([rows for rows, _ in parts]) if len(parts) > 1 else parts[0][0]
        if self._weights == "int4":
            y = self._in_blocks(name, x, weight, bits)
        else:
            y = self._op("MatMul", x, self._weight(f"{name}.weight", weight.t()))
        biases = [torch.zeros(len(rows)) if bias is None else bias.float() for rows, bias in parts]
        if all(bias is None for _, bias in parts):
            return y
        return self._op("Add", y, self._weight(f"{name}.bias", torch.cat(biases)))

    def _in_blocks(self, name: str, x: ir.Value, weight: Tensor, bits: int) -> ir.Value:
        data, scales, zeros = _blocks(weight, bits)
        packed = (data, scales.reshape(-1), zeros.reshape(-1))
        arrays = [
            self._constant(f"{name}.{part}", a) for part, a in zip(("blocks", "scales", "zeros"), packed, strict=True)
        ]
        way: dict[str, Any] = {"K": weight.shape[1], "N": weight.shape[0], "bits": bits, "block_size": _BLOCK}
        return self._op("MatMulNBits", x, *arrays, domain=_MS, accuracy_level=_EXACT, **way)

    # --- values

    def _op(self, kind: str, *inputs: ir.Value | None, domain: str = "", count: int = 1, **attributes: Any) -> Any:
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=count)
        number = len(self._nodes)
        node.name = f"{kind}.{number}"
        for index, output in enumerate(node.outputs):
            output.name = f"{kind}.{number}.{index}"
        self._nodes.append(node)
        return node.outputs[0] if count == 1 else node.outputs

    def _input(self, name: str, kind: ir.DataType, shape: list[Any]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
        self._inputs.append(value)
        return value

    def _output(self, value: ir.Value, name: str, shape: list[Any]) -> None:
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(self._kind)
        self._outputs.append(value)

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """An initializer; of one name there is one."""
        if name not in self._initializers:
            tensor = ir.tensor(np.ascontiguousarray(array), name=name)
            self._initializers[name] = ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self._initializers[name]

    def _weight(self, name: str, tensor: Tensor) -> ir.Value:
        return self._constant(name, tensor.detach().float().numpy().astype(self._dtype))

    def _number(self, name: str, value: float) -> ir.Value:
        return self._constant(name, np.asarray(value, self._dtype))

    def _integers(self, name: str, values: Any) -> ir.Value:
        return self._constant(name, np.asarray(values, np.int64))


def _rows(linear: LinearSpec) -> Rows:
    return rows_of(linear.module)


def _parts(linear: LinearSpec) -> list[Rows]:
    """The matrices of a linear that holds several projections."""
    weight, bias = rows_of(linear.module)
    if linear.rows is None:
        return [(weight, bias)]
    biases = [None] * linear.parts if bias is None else bias.split(linear.rows)
    return list(zip(weight.split(linear.rows), biases, strict=True))


def make_fast(path: Path) -> None:
    """Has products with blocks in a model that was saved round their inputs to 8 bits, too."""
    model = ir.load(path)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FAST)
    ir.save(model, path)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A matrix with the numbers that its blocks stand for."""
    data, scales, zeros = (torch.from_numpy(array) for array in _blocks(weight, bits))
    if bits == 4:
        data, zeros = (torch.stack([t & 15, t >> 4], -1).flatten(-2) for t in (data, zeros))
    blocks = data.shape[1]
    numbers = (data.float() - zeros[:, :blocks, None].float()) * scales[..., None]
    return numbers.flatten(1)[:, : weight.shape[1]].to(weight.dtype)


def _blocks(weight: Tensor, bits: int) -> tuple[Any, Any, Any]:
    """A matrix ``[outputs, inputs]`` in blocks of 32 inputs: integers uint8 ``[outputs, blocks, bytes]``, the lower
    half of a byte first, scales float32 ``[outputs, blocks]`` and zero points uint8 ``[outputs, bytes]``.

    Of 4 bits a block spans from its least to its largest number, zero included; of 8 bits it is symmetric.
    """
    rows, inputs = weight.shape
    blocks = -(-inputs // _BLOCK)
    padded = torch.nn.functional.pad(weight.float(), (0, blocks * _BLOCK - inputs)).view(rows, blocks, _BLOCK)
    least, most = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    if bits == 4:
        scale = (most - least) / 15
        scale = torch.where(scale == 0, 1.0, scale)
        zero = (-least / scale).round()
    else:
        scale = torch.maximum(most, -least) / 127
        scale = torch.where(scale == 0, 1.0, scale)
        zero = torch.full_like(scale, 128.0)
    found = ((padded / scale[..., None]).round() + zero[..., None]).clamp(0, 2**bits - 1).to(torch.uint8)
    zeros = zero.to(torch.uint8)
    if bits == 4:
        found = found[..., ::2] | (found[..., 1::2] << 4)
        zeros = torch.nn.functional.pad(zeros, (0, blocks % 2))
        zeros = zeros[:, ::2] | (zeros[:, 1::2] << 4)
    return found.numpy(), scale.numpy(), zeros.numpy()
