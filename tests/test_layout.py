"""The house rules: imports run one way, one __init__.py, names that clash with nothing, a face that is what it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import coreskip

ROOT = Path(__file__).parent.parent
ORDER = ["kernels", "predictors", "runtime", "bench", "coreskip"]
FORBIDDEN = {"select", "profile", "statistics", "types", "triton", "torch"}


def modules() -> list[Path]:
    return [path for folder in ORDER for path in (ROOT / folder).glob("*.py")]


def imported_folders(path: Path) -> set[str]:
    """The coreskip folders that a file imports from, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level == 1:
                found.add(path.parent.name)
            elif node.level == 2:
                found.add(parts[0])
            elif parts[0] == "coreskip":
                found.add(parts[1] if len(parts) > 1 else "coreskip")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "coreskip":
                    found.add(parts[1] if len(parts) > 1 else "coreskip")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_run_one_way(path: Path) -> None:
    here = ORDER.index(path.parent.name)
    back = {folder for folder in imported_folders(path) if folder in ORDER and ORDER.index(folder) > here}
    assert not back, f"{path} imports {back}"


def test_only_the_face_has_an_init() -> None:
    folders = [*ORDER, "tests"]
    assert [f for f in folders if (ROOT / f / "__init__.py").exists()] == ["coreskip"]
    assert not FORBIDDEN & {path.stem for path in modules()}


def test_public_names() -> None:
    assert list(coreskip.__all__) == sorted(coreskip.__all__)
    for name in coreskip.__all__:
        assert getattr(coreskip, name).__doc__, name
    assert set(coreskip.__all__) >= {"Engine", "Plan", "analyze", "load", "unwrap", "wrap"}
    with pytest.raises(AttributeError, match="nonsense"):
        coreskip.nonsense  # noqa: B018


def test_a_checkout_works_without_an_install() -> None:
    """As on a machine where nothing can be installed: PYTHONPATH alone, and transformers not confused by kernels/."""
    code = (
        "import coreskip, coreskip.cli; from transformers import LlamaForCausalLM; "
        "from coreskip.kernels import ops; print(coreskip.Plan.__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {[str(ROOT), *sys.path]!r}; {code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert run.stdout.strip() == "Plan", run.stderr


def test_the_version_is_stated_once_in_effect() -> None:
    """setuptools cannot read it from a mapped package, so pyproject.toml repeats it."""
    assert f'\nversion = "{coreskip.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, coreskip.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
