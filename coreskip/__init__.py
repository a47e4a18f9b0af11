"""coreskip: sparse inference for any Hugging Face causal LM.

model, tokenizer = coreskip.load()
plan = coreskip.analyze(model, tokenizer, budget="ppl+1%")
coreskip.wrap(model, plan)      # model.generate(...) now decodes under the plan
coreskip.unwrap(model)          # and bit-identical to before
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# GNU's OpenMP, on whose threads torch multiplies, reads this when torch is loaded. Unset, its threads spin for
# milliseconds wherever they wait, on cores that other processes need: of two processes on two cores, a prompt took
# each eight times as long as alone, and with this twice as long. Alone, nothing is lost (bench/rows/sharing.jsonl).
if "torch" not in sys.modules and not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "5000"

# A wheel holds the subpackages inside this folder; a checkout holds them beside it.
_here = Path(__file__).parent
__path__ = [str(_here if (_here / "kernels").is_dir() else _here.parent)]
# the command line lives here in both
__path__ += [path for path in [str(_here)] if path not in __path__]

from coreskip.predictors.version import VERSION  # noqa: E402  (needs __path__)

__version__ = VERSION

# public name -> where it lives; loaded on first use, so that `coreskip --help` does not wait for torch
_HOMES = {
    "ControlVector": "coreskip.predictors.control_vectors",
    "CoreskipError": "coreskip.predictors.errors",
    "Engine": "coreskip.runtime.engine",
    "NeuronScores": "coreskip.predictors.scores",
    "NeuronSet": "coreskip.predictors.scores",
    "Plan": "coreskip.predictors.plan",
    "PlanError": "coreskip.predictors.errors",
    "analyze": "coreskip.runtime.analyze",
    "control_vector": "coreskip.runtime.steer_vectors",
    "evaluate": "coreskip.runtime.quality",
    "export": "coreskip.runtime.export",
    "load": "coreskip.runtime.load",
    "pack": "coreskip.runtime.pack",
    "pareto": "coreskip.runtime.search",
    "ppl_sparsity": "coreskip.runtime.sparsing_law",
    "prefilling": "coreskip.runtime.phases",
    "scores": "coreskip.runtime.scoring",
    "steer": "coreskip.runtime.steer",
    "switch_off": "coreskip.runtime.behaviour_plans",
    "unwrap": "coreskip.runtime.wrap",
    "wrap": "coreskip.runtime.wrap",
}

__all__ = [
    "ControlVector",
    "CoreskipError",
    "Engine",
    "NeuronScores",
    "NeuronSet",
    "Plan",
    "PlanError",
    "analyze",
    "control_vector",
    "evaluate",
    "export",
    "load",
    "pack",
    "pareto",
    "ppl_sparsity",
    "prefilling",
    "scores",
    "steer",
    "switch_off",
    "unwrap",
    "wrap",
]

if TYPE_CHECKING:
    from coreskip.predictors.control_vectors import ControlVector
    from coreskip.predictors.errors import CoreskipError, PlanError
    from coreskip.predictors.plan import Plan
    from coreskip.predictors.scores import NeuronScores, NeuronSet
    from coreskip.runtime.analyze import analyze
    from coreskip.runtime.behaviour_plans import switch_off
    from coreskip.runtime.engine import Engine
    from coreskip.runtime.export import export
    from coreskip.runtime.load import load
    from coreskip.runtime.pack import pack
    from coreskip.runtime.phases import prefilling
    from coreskip.runtime.quality import evaluate
    from coreskip.runtime.scoring import scores
    from coreskip.runtime.search import pareto
    from coreskip.runtime.sparsing_law import ppl_sparsity
    from coreskip.runtime.steer import steer
    from coreskip.runtime.steer_vectors import control_vector
    from coreskip.runtime.wrap import unwrap, wrap


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'coreskip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
