"""The structs that native code is called with, field by field as in csrc/arguments.h."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

_P, _I, _N, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


def _fields(kind: Any, names: str) -> Iterable[tuple[str, Any]]:
    return ((name, kind) for name in names.split())


class MlpArguments(ctypes.Structure):
    _fields_ = (
        *_fields(_P, "x weight low scale norm gate_bias up_bias down_bias mean indices"),
        *_fields(_N, "hidden neurons stride count keep"),
        *_fields(_F, "threshold refine"),
        *_fields(_I, "x_dtype w_dtype rows gated act lists rule threads"),
    )


class StepNorm(ctypes.Structure):
    _fields_ = (("weight", _P), ("bias", _P), ("size", _N), ("eps", _F), ("kind", _I))


class StreamPiece(ctypes.Structure):
    _fields_ = tuple(_fields(_N, "at bytes place after begin end"))


class SlotLayer(ctypes.Structure):
    _fields_ = (*_fields(_N, "units parts"), *_fields(_N * 3, "at step from_ bytes"))


class SlotFigures(ctypes.Structure):
    _fields_ = tuple(_fields(_N, "wanted missed expected reads read_bytes waited"))


class StepLinear(ctypes.Structure):
    _fields_ = (
        *_fields(_P, "weight scale bias norm counts"),
        *_fields(_N, "in_ out stride tile"),
        ("neurons", ctypes.c_double),
        ("least", _F),
        *_fields(_N, "piece pieces"),
        *_fields(_I, "dtype columns whole"),
    )


class NeuronGroups(ctypes.Structure):
    _fields_ = (
        *_fields(_P, "scan rows rest ends norm reach gate_bias up_bias mean place"),
        *_fields(_N, "neurons width row_bytes rest_bytes"),
        *_fields(_F, "threshold refine"),
        *_fields(_I, "format gated"),
    )


class StepMlp(ctypes.Structure):
    _fields_ = (
        *_fields(_P, "weight low scale norm gate_bias up_bias down_bias mean list selected"),
        *_fields(_N, "neurons stride keep listed"),
        *_fields(_F, "threshold refine"),
        *_fields(_I, "dtype gated rule"),
        *_fields(StepLinear, "reduce expand"),
        ("gates", _P),
        ("slots", _N),
        ("groups", NeuronGroups),
    )


class StepRouter(ctypes.Structure):
    _fields_ = (
        ("logits", StepLinear),
        *_fields(_P, "correction kept"),
        *_fields(_N, "count chosen groups groups_kept"),
        *_fields(_F, "added floor scale least jitter"),
        *_fields(_I, "scoring by_pairs normalized"),
    )


class StepExperts(ctypes.Structure):
    _fields_ = (
        ("router", StepRouter),
        ("matrices", _P),
        ("shared_gate", StepLinear),
        *_fields(_F, "limit slope offset shared_scale"),
        ("by_inputs", _I),
        ("slots", _N),
    )


class StepHeads(ctypes.Structure):
    _fields_ = tuple(_fields(_N, "offset run step width"))


class StepLatentPart(ctypes.Structure):
    _fields_ = (
        *_fields(StepLinear, "q_low kv_low"),
        *_fields(StepNorm, "q_low_norm kv_low_norm"),
        *_fields(_N, "rank nope rope value"),
        ("apart", _I),
    )


class StepRecurrence(ctypes.Structure):
    _fields_ = (
        ("more", StepLinear * 2),
        ("places", StepHeads * 6),
        ("from_", _I * 6),
        *_fields(_P, "taps tap_bias fading fading_bias"),
        ("norm", StepNorm),
        *_fields(_N, "tap_count read_heads heads key_dim value_dim"),
        *_fields(_F, "most_rate unit_eps"),
        *_fields(_I, "tap_act open_act"),
    )


class StepLayer(ctypes.Structure):
    _fields_ = (
        *_fields(StepNorm, "attention_in q_norm k_norm attention_out mlp_in mlp_out attention_after mlp_after"),
        *_fields(StepLinear, "q k v o gate up down"),
        ("mlp", StepMlp),
        ("experts", StepExperts),
        *_fields(StepHeads, "q_heads k_heads v_heads"),
        ("latent", StepLatentPart),
        *_fields(_N, "heads kv_heads head_dim rope_dim window cache"),
        *_fields(_P, "cos sin slopes sinks"),
        *_fields(_F, "attention_scale softcap residual_scale"),
        *_fields(_I, "act run_attention run_mlp parallel fused paired turned special"),
        *_fields(StepNorm, "v_norm attended_norm inner_norm"),
        *_fields(StepLinear, "attention_gate"),
        *_fields(StepHeads, "gate_heads"),
        *_fields(_F, "v_scale"),
        *_fields(_I, "gating gate_width"),
        *_fields(StepLinear, "side_gate side_out"),
        ("side_norm", StepNorm),
        ("side_at", _N),
        ("side_act", _I),
        ("scale", _F),
        *_fields(_P, "curve wanted"),
        ("wanted_rows", _N),
        ("recurrence", StepRecurrence),
    )


class StepModel(ctypes.Structure):
    _fields_ = (
        *_fields(_P, "layers embedding places"),
        *_fields(StepNorm, "embedding_norm token_norm norm"),
        *_fields(StepLinear, "head before_head"),
        ("before_norm", StepNorm),
        ("side", StepLinear),
        ("side_norm", StepNorm),
        *_fields(_P, "side_table stream slots"),
        *_fields(_N, "side_width layer_count hidden embedding_stride"),
        *_fields(_F, "embedding_scale logit_scale logit_softcap side_scale side_table_scale side_sum"),
        *_fields(_I, "embedding_dtype places_dtype kv_dtype logit_dtype before_act side_dtype reads_ahead"),
    )


class StepCache(ctypes.Structure):
    _fields_ = (*_fields(_P, "keys values"), *_fields(_N, "head_stride first"))


class StepCall(ctypes.Structure):
    _fields_ = (
        *_fields(_P, "tokens positions start past caches logits hidden skipped"),
        *_fields(_N, "rows length wanted"),
        ("threads", _I),
    )


class PrefillCall(ctypes.Structure):
    _fields_ = (*_fields(_P, "x positions cache activations"), *_fields(_N, "length past start"), ("threads", _I))


# in the order of coreskip_sizes
_STRUCTS = (
    MlpArguments, StepNorm, StepLinear, NeuronGroups, StepMlp, StepRouter, StepExperts, StepLayer, StepModel, StepCache,
    StepCall, PrefillCall, StreamPiece, SlotLayer, SlotFigures,
)  # fmt: skip


def mismatch(library: ctypes.CDLL) -> str | None:
    """What the compiled library and these structs disagree about; None: nothing. A library that was compiled from other
    sources would read arguments from wrong places."""
    if not hasattr(library, "coreskip_sizes"):
        return "it does not tell the sizes of its arguments"
    sizes = (_N * (len(_STRUCTS) + 1))()
    count = library.coreskip_sizes(sizes, len(sizes))
    if count != len(_STRUCTS):
        return f"it takes {count} kinds of arguments, not {len(_STRUCTS)}"
    for struct, size in zip(_STRUCTS, sizes, strict=False):
        if ctypes.sizeof(struct) != size:
            return f"its {struct.__name__} has {size} bytes, not {ctypes.sizeof(struct)}"
    return None
