"""coreskip: sparse inference for any Hugging Face causal LM."""

from pathlib import Path

# A wheel holds the subpackages inside this folder; a checkout holds them beside it.
_here = Path(__file__).parent
__path__ = [str(_here if (_here / "kernels").is_dir() else _here.parent)]
