"""OpenVINO GenAI as a runner: through stand-ins for its two modules everywhere, and for real where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from coreskip.bench.processes import Local, RunnerFailed
from coreskip.bench.runner import Job
from coreskip.bench.runners import OPPONENTS, missing
from coreskip.bench.settings import settings_of

STAND_INS = {
    "openvino.py": """
class Type:
    def __init__(self, name): self.name = name
    def get_type_name(self): return self.name

class Core:
    def get_property(self, device, name):
        return {"KV_CACHE_PRECISION": Type("u8"), "INFERENCE_PRECISION_HINT": Type("f32")}.get(name, 32)

Tensor = list
""",
    "openvino_genai.py": """
import time

class StreamerBase:
    pass

class StreamingStatus:
    RUNNING = 0

def GenerationConfig(**options):
    assert options["ignore_eos"] and not options["do_sample"], options
    return options

def TokenizedInputs(ids, mask):
    return ids

class SchedulerConfig:
    enable_prefix_caching = True


class LLMPipeline:
    def __init__(self, path, device, **options):
        assert path.endswith(".gguf") and device == "CPU", (path, device)
        self.threads = options["INFERENCE_NUM_THREADS"]
        print("chatter on stdout")

    def generate(self, ids, config, streamer):
        last = int(ids[0][-1])
        if last == 666:
            raise ValueError("the last straw")
        for i in range(config["max_new_tokens"]):
            time.sleep(0.01)
            streamer.write([last + self.threads + i])
        streamer.end()
""",
}


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in STAND_INS.items():
        (tmp_path / name).write_text(source)
    metadata = tmp_path / "openvino_genai-9.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: openvino-genai\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CORESKIP_OPENVINO_PYTHON", sys.executable)
    monkeypatch.setattr("coreskip.bench.openvino_peer.gguf_weights", lambda path: (1000, "q4_1"))


def test_tokens_clock_and_arithmetic_come_over_the_pipe(stand_ins: None) -> None:
    runner = Local(Job("openvino", "gguf", gguf=Path("m.gguf"), threads=3))
    runner("load")
    generation = runner("generate", [1, 2, 7], 4)
    assert generation.tokens == [10, 11, 12, 13]
    assert generation.ttft >= 0.01
    assert len(generation.gaps) == 3
    assert min(generation.gaps) >= 0.01
    assert runner("generate", [5], 1).tokens == [8]
    traits = runner("traits")
    assert traits["dtype"] == "q4_1"
    assert traits["notes"].startswith("KV cache in u8, inputs of matrices in 8 bits by groups of 32")
    assert runner("versions")["openvino-genai"] == "9.9"
    assert runner("weight_bytes") == 1000
    assert runner("perplexity", None, 1) is None
    # the model's memory is that of its process, which has no torch
    assert 1 << 20 < runner("memory") < Local(Job("hf", "float32"))("memory")
    server = runner._target._server
    runner.close()
    assert server.poll() is not None


def test_what_ends_its_process_is_told(stand_ins: None) -> None:
    runner = Local(Job("openvino", "gguf", gguf=Path("m.gguf")))
    runner("load")
    with pytest.raises(RunnerFailed, match="process ended: ValueError: the last straw"):
        runner("generate", [666], 1)
    runner.close()
    broken = Local(Job("openvino", "gguf", gguf=Path("m.bin")))
    with pytest.raises(RunnerFailed, match="process ended: AssertionError"):
        broken("load")
    broken.close()


def test_another_environment_may_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORESKIP_OPENVINO_PYTHON", sys.executable)
    assert missing(["openvino"]) == {}
    monkeypatch.setenv("CORESKIP_OPENVINO_PYTHON", "/nowhere/python")
    assert missing(["openvino", "hf"]) == {"openvino": "pip install openvino-genai"}
    monkeypatch.delenv("CORESKIP_OPENVINO_PYTHON")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing(["openvino"]) == {"openvino": "pip install openvino-genai"}


def test_it_is_a_peer_of_the_benchmark() -> None:
    assert "openvino" in OPPONENTS
    chosen = settings_of(model=None, against="hf,openvino", dtypes="int4")
    assert [str(job) for job in chosen.jobs if job.runner == "openvino"] == ["openvino gguf"]


def test_it_makes_the_embedded_models_own_text(embedded: tuple[Any, Any]) -> None:
    if missing(["openvino"]):
        pytest.skip("needs openvino-genai, here or under the Python that CORESKIP_OPENVINO_PYTHON names")
    ids = embedded[1]("The capital of France is").input_ids
    runner = Local(Job("openvino", "gguf"))
    runner("load")
    made = runner("generate", ids, 8).tokens
    runner.close()
    judge = Local(Job("hf", "float32"))
    judge("load")
    assert sum(judge("regrets", ids, made)) / 8 < 0.5
