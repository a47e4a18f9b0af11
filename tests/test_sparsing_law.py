"""PPL-p% sparsity against a direct computation: every step of its definition, written down a second time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_quality import text
from tiny_models import tiny
from torch import Tensor
from transformers import DynamicCache

import coreskip
from coreskip import CoreskipError
from coreskip.predictors.anatomy import dissect


def direct(model: Any, least: list[float]) -> tuple[float, float]:
    """Perplexity and share left out on the scored half, from masks on the down projections' inputs."""
    rows = text(400).split(0.5, 0.5)[1].windows(32, 4)
    counts = [0, 0]
    decoding = False

    def mask(index: int, down: Any) -> Any:
        norm = down.weight.norm(dim=0)

        def before(module: Any, arguments: tuple[Tensor]) -> tuple[Tensor] | None:
            if not decoding:
                return None
            wanted = arguments[0].abs() * norm >= least[index]
            counts[0] += int((~wanted).sum())
            counts[1] += wanted.numel()
            return (torch.where(wanted, arguments[0], 0),)

        return down.register_forward_pre_hook(before)

    handles = [mask(index, mlp.down) for index, mlp in enumerate(dissect(model).mlps)]
    losses = []
    with torch.no_grad():
        for ids in rows.split(1):
            decoding = False
            cache = DynamicCache(config=model.config)
            logits = [model(ids[:, :16], past_key_values=cache).logits[:, -1]]
            decoding = True
            logits += [model(ids[:, i : i + 1], past_key_values=cache).logits[:, 0] for i in range(16, 31)]
            log_p = torch.cat(logits).log_softmax(-1)
            losses.append(-float(log_p.gather(1, ids[0, 16:, None]).mean()))
    for handle in handles:
        handle.remove()
    return math.exp(sum(losses) / len(losses)), counts[0] / counts[1]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_is_what_it_is_defined_as(family: str) -> None:
    from coreskip.predictors.token_choice import TokenCalibration

    model = tiny(family)
    found = coreskip.ppl_sparsity(model, None, text(400), percent=20, windows=4, window=32, steps=5, progress=False)
    fitted = text(400).split(0.5, 0.5)[0].windows(32, 4)
    calibration = TokenCalibration(model, fitted, progress=False)
    dense, _ = direct(model, [0.0] * 3)
    assert found["dense_ppl"] == pytest.approx(dense, rel=1e-3)
    assert found["cett"] > 0
    sparse, sparsity = direct(model, calibration.cett(found["cett"]))
    assert found["sparsity"] == pytest.approx(sparsity, abs=2e-3)
    assert found["ppl_increase"] == pytest.approx(sparse / dense - 1, abs=2e-3)
    assert found["ppl_increase"] <= 0.2
    further, _ = direct(model, calibration.cett(found["cett"] + 1 / 32))
    assert further / dense - 1 > 0.2, "the next CETT that was tried costs more"


def test_mistakes(llama: Any) -> None:
    with pytest.raises(CoreskipError, match="percent is 0"):
        coreskip.ppl_sparsity(llama, None, text(), percent=0)
    with coreskip.wrap(llama, coreskip.Plan.dense(llama)), pytest.raises(CoreskipError, match="wrapped already"):
        coreskip.ppl_sparsity(llama, None, text())
