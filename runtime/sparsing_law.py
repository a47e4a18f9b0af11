"""PPL-p% sparsity (Sparsing Law, arXiv 2411.02335, section 3): how many neurons a model could do without, by oracle."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from ..predictors.anatomy import dissect
from ..predictors.calibration import TokenText, most_positions, text_of
from ..predictors.checks import check_above_zero, check_count
from ..predictors.plan import LayerPlan, Plan
from ..predictors.policies import TopK
from ..predictors.token_choice import TokenCalibration
from .emulation import Emulation
from .quality import WINDOW
from .wrap import make_way


def ppl_sparsity(
    model: Any,
    tokenizer: Any,
    text: str | os.PathLike[str] | TokenText,
    *,
    percent: float = 1.0,
    windows: int = 8,
    window: int = WINDOW,
    steps: int = 7,
    progress: bool = True,
) -> dict[str, float]:
    """The share of MLP neurons left out at the one CETT, shared by all layers, that costs `percent` % of perplexity.

    CETT, the cumulative error of tail truncation, is the norm of the sum of the outputs left out over the norm of the
    MLP's output, as a mean over tokens; each layer's threshold on the exact ||n_i|| follows from it, fitted on one
    dense run over the text's first half. Perplexity is scored on its second half as everywhere here: the prompt of
    each window dense, the rest under the thresholds; the paper truncates every token.

    Args:
        percent: p, above 0.
        windows, window: as in `evaluate_all`.
        steps: of the bisection over CETT; 7 find it to within 0.008.

    Returns:
        ``{"percent", "cett", "sparsity", "ppl_increase", "dense_ppl"}``: of the largest CETT tried that stays within.
    """
    make_way(model)
    dissect(model)
    check_above_zero("percent", percent)
    for name, value, least in (("windows", windows, 1), ("window", window, 2), ("steps", steps, 1)):
        check_count(name, value, least)
    text = text_of(tokenizer, text)
    fitted, scored = text.split(0.5, 0.5)
    window = min(window, most_positions(model, window), len(fitted.ids), len(scored.ids)) // 2 * 2
    calibration = TokenCalibration(model, fitted.windows(window, windows), most=2048, progress=progress)
    emulation = Emulation(model, scored, windows=windows, window=window, progress=progress)
    dense = Plan.dense(model)
    low, high = 0.0, 1.0
    best = {"cett": 0.0, "sparsity": 0.0, "ppl_increase": 0.0}
    for _ in range(steps):
        cett = (low + high) / 2
        layers = tuple(LayerPlan(TopK(keep=1.0, threshold=least)) for least in calibration.cett(cett))
        quality = emulation.score(replace(dense, layers=layers))
        if quality["ppl_increase"] <= percent / 100:
            low = cett
            best = {"cett": cett, "sparsity": quality["neuron_sparsity"], "ppl_increase": quality["ppl_increase"]}
        else:
            high = cett
    return {"percent": percent, **best, "dense_ppl": emulation.dense_ppl}
