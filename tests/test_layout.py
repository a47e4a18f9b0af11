"""The house rules: imports run one way, one __init__.py, names that clash with nothing, a face that is what it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import coreskip
from coreskip.predictors.interventions import INTERVENTIONS
from coreskip.predictors.policies import LAYER_POLICIES, NEURON_POLICIES

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


def files_imported(path: Path) -> set[str]:
    """The files of its own folder that a file imports, at any depth of the file and for types, too."""
    siblings, found = {other.stem for other in path.parent.glob("*.py")}, set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module, here = node.module or "", f"coreskip.{path.parent.name}"
            if path.parent.name == "coreskip":
                here = "coreskip"
            if node.level == 1 or module.startswith(f"{here}."):
                found.add(module.removeprefix(f"{here}.").partition(".")[0])
            if (node.level == 1 and not module) or module == here:
                found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.rpartition(".")[2] for alias in node.names if alias.name.startswith("coreskip.")}
    return (found & siblings) - {path.stem}


@pytest.mark.parametrize("folder", ORDER)
def test_no_circle_of_imports(folder: str) -> None:
    imports = {path.stem: files_imported(path) for path in (ROOT / folder).glob("*.py")}
    reached = {name: set(found) for name, found in imports.items()}
    for _ in imports:
        for found in reached.values():
            found |= {further for name in list(found) for further in reached[name]}
    assert not {name for name, found in reached.items() if name in found}, imports


def sources() -> list[Path]:
    code = [*modules(), *(ROOT / "tests").glob("*.py")]
    return code + [path for kind in ("*.cpp", "*.h") for path in (ROOT / "kernels").rglob(kind)]


def test_no_file_is_longer_than_600_lines_and_no_class_than_300() -> None:
    assert not {p.name: n for p in sources() if (n := len(p.read_text().splitlines())) > 600}
    longest = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                longest[f"{path.name}: {node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    assert not {name: lines for name, lines in longest.items() if lines > 300}


def test_nothing_but_the_registry_asks_what_type_a_policy_has() -> None:
    """A policy says what it is by its fields and class attributes; what it computes is one builder's."""
    every = (*NEURON_POLICIES.values(), *LAYER_POLICIES.values(), *INTERVENTIONS.values())
    policies = {cls.__name__ for cls in every}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not asked & policies, f"{path.name}, line {node.lineno}"


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
