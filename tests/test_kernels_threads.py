"""The kernels' threads: how they share cores with other processes, and when they come and go."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coreskip.kernels import arguments, cpu, ops
from coreskip.kernels.cores import quota

pytestmark = pytest.mark.skipif(ops.available("cpu") is not None, reason="needs the compiled kernels")
linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="sets and counts threads as Linux does")

# A decode step of 12 layers in 4 bits, without a model around it.
STEP = """
import os, sys, time, torch
from coreskip.kernels.packed import PackedLinear
from coreskip.kernels.step import Attention, DenseMLP, KeyValues, Norm, Step, StepLayer, StepModel

def linear(outputs, inputs):
    return PackedLinear.pack(torch.randn(outputs, inputs) / inputs**0.5, fmt="int4")

def norm():
    return Norm(torch.ones(256), None, 1e-5, "rms")

def decoder(layers=12, positions=256):
    torch.manual_seed(0)
    some = [
        StepLayer(
            Attention(*(linear(256, 256) for _ in range(4)), 64, 0.125),
            DenseMLP(linear(768, 256), linear(768, 256), linear(256, 768)),
            "silu", attention_in=norm(), mlp_in=norm(),
        )
        for _ in range(layers)
    ]
    step = Step(StepModel(torch.randn(1000, 256), some, norm(), linear(1000, 256), torch.float32))
    rooms = [torch.zeros(1, 4, positions, 64) for _ in range(2 * layers)]
    return step, KeyValues(rooms[:layers], rooms[layers:], [0] * layers)
"""


def start(script: str, **environment: str) -> subprocess.Popen[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**variables, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def run(script: str, **environment: str) -> str:
    output, errors = start(script, **environment).communicate(timeout=120)
    assert not errors, errors[-3000:]
    return output


@linux
def test_no_more_threads_than_cores():
    script = f"""{STEP}
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
torch.set_num_threads(4)
step, cache = decoder(2)
before = len(os.listdir("/proc/self/task"))
step.generate(1, 0, 0, cache, 0, 8, [])
print(before, len(os.listdir("/proc/self/task")))
"""
    before, after = run(script).split()
    assert before == after


@linux
def test_the_result_does_not_depend_on_who_computes_it():
    """Partial sums are divided by the number of threads that is asked for, however many cores there are for them."""
    script = f"""{STEP}
from coreskip.kernels.ops import PackedMLP, mlp
from coreskip.kernels.sparse import SparseMLP
cores = os.sched_getaffinity(0)
torch.set_num_threads(3)
torch.manual_seed(0)
weights = [torch.randn(384, 256) / 16 for _ in range(3)]
packed, x = PackedMLP.pack(*weights, act="silu"), torch.randn(2, 256)
attention = Attention(*(linear(256, 256) for _ in range(4)), 64, 0.125)
layers = [StepLayer(attention, SparseMLP(packed, rule, **how), "silu", attention_in=norm(), mlp_in=norm())
          for rule, how in (("listed", {{}}), ("gate", {{"keep": 100}}), ("listed", {{}}))]
step = Step(StepModel(torch.randn(500, 256), layers, norm(), linear(500, 256), torch.float32))
rooms = [torch.zeros(2, 4, 64, 64) for _ in range(6)]
cache = KeyValues(rooms[:3], rooms[3:], [0] * 3)
tokens, places = torch.tensor([[1], [2]]), torch.tensor([[0], [0]])
found = []
for some in ({{min(cores)}}, cores, cores, cores):
    os.sched_setaffinity(0, some)
    time.sleep(0.15)  # how many cores there are is looked at ten times a second
    logits, skipped = step.run(tokens, places, torch.zeros(2, dtype=torch.int64), cache, 0, 1)
    found.append((mlp(x, packed, backend="cpu"), logits, torch.tensor(skipped)))
print(all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other)))
"""
    assert run(script) == "True\n"


@linux
def test_a_forked_child_has_threads_of_its_own():
    script = f"""{STEP}
torch.set_num_threads(2)
step, cache = decoder(2)
expected = step.generate(1, 0, 0, cache, 0, 16, [])[0]
child = os.fork()
if child == 0:
    same = step.generate(1, 0, 0, cache, 0, 16, [])[0] == expected
    sys.exit(0 if same else 3)
print(os.waitpid(child, 0)[1], step.generate(1, 0, 0, cache, 0, 16, [])[0] == expected)
"""
    assert run(script) == "0 True\n"


def test_the_process_ends_while_another_thread_computes():
    script = f"""{STEP}
import threading
torch.set_num_threads(2)
step, cache = decoder(2, 20_000)
def work():  # one call that lasts: torch itself aborts where a thread comes back into it while Python ends
    step.generate(1, 0, 0, cache, 0, 20_000, [])
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
print("end")
"""
    begin = time.monotonic()
    process = start(script)
    output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ("end\n", 0)
    assert time.monotonic() - begin < 55


def test_the_build_knows_all_sources():
    """What is compiled, what it depends on, and what an installed package carries along."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    root = Path(__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    (module,) = settings["ext-modules"]
    found = {str(file.relative_to(root)) for kind in ("*.cpp", "*.h") for file in root.glob(f"kernels/csrc/**/{kind}")}
    assert found == {*module["sources"], *module["depends"]}
    carried = settings["package-data"]["coreskip.kernels"]
    assert all(any(Path(file).relative_to("kernels").match(kind) for kind in carried) for file in found)


def test_a_quota_of_version_2(tmp_path):
    group = tmp_path / "sys/fs/cgroup/a/b"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    assert quota(tmp_path) is None
    (group / "cpu.max").write_text("max 100000\n")
    assert quota(tmp_path) is None
    (group.parent / "cpu.max").write_text("150000 100000\n")
    assert quota(tmp_path) == 2
    (group / "cpu.max").write_text("20000 100000\n")
    assert quota(tmp_path) == 1


def test_a_quota_of_version_1(tmp_path):
    top = tmp_path / "sys/fs/cgroup/cpu"
    top.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/m\n1:cpu,cpuacct:/docker/abc\n0::/\n")
    for name, text in (("cpu.cfs_quota_us", "-1\n"), ("cpu.cfs_period_us", "100000\n")):
        (top / name).write_text(text)
    assert quota(tmp_path) is None
    (top / "cpu.cfs_quota_us").write_text("300000\n")  # the host's path is not there: the root is the container's
    assert quota(tmp_path) == 3


def test_no_control_groups(tmp_path):
    assert quota(tmp_path) is None


def test_structs_of_another_version_are_refused(monkeypatch):
    library = cpu.library()
    assert arguments.mismatch(library) is None

    class Grown(arguments.StepCall):
        _fields_ = (("more", arguments._N),)

    monkeypatch.setattr(arguments, "_STRUCTS", (*arguments._STRUCTS[:-1], Grown))
    assert "StepCall" not in (found := arguments.mismatch(library) or "")
    assert "Grown has" in found
    cpu.library.cache_clear()
    with pytest.raises(cpu.Unavailable, match="install coreskip again"):
        cpu.library()
    monkeypatch.undo()
    cpu.library.cache_clear()
    assert cpu.library()
