"""OpenVINO GenAI as a runner, in a process of its own, under this Python or another one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coreskip.bench.clock import Generation
from coreskip.bench.peers import gguf_of, gguf_weights
from coreskip.bench.runner import Runner, Scored
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.errors import CoreskipError

#: names the Python of another environment, for where openvino-genai and coreskip cannot be installed together
PYTHON_VARIABLE = "CORESKIP_OPENVINO_PYTHON"
_SERVER = Path(__file__).with_name("openvino_server.py")


class OpenVino(Runner):
    """OpenVINO GenAI's `LLMPipeline` on a GGUF file as it is, with the CPU plugin's own defaults: its KV cache and the
    inputs of its matrices are quantised to 8 bits, which the row says. It does not tell logits: no perplexity."""

    def load(self) -> None:
        path = gguf_of(self.job)
        self._bytes, self._kind = gguf_weights(path)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        command = [os.environ.get(PYTHON_VARIABLE) or sys.executable, str(_SERVER), str(path), str(self.job.threads)]
        self._server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # else the modules of this folder would hide others
        )
        self.process = self._server.pid
        self._arithmetic = self._answer()

    def generate(self, ids: Sequence[int], new: int) -> Generation:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({"ids": list(ids), "new": new}) + "\n")
        self._server.stdin.flush()
        found = self._answer()
        seconds = found["seconds"]
        gaps = [after - before for before, after in itertools.pairwise(seconds)]
        return Generation(found["tokens"], seconds[0], gaps)

    def _answer(self) -> dict[str, Any]:
        """The server's next line.

        Raises:
            CoreskipError: it ended instead; the message is the last line that it wrote to stderr.
        """
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if line:
            return dict(json.loads(line))
        self._server.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
        raise CoreskipError(f"OpenVINO GenAI's process ended: {last[-1][:300]}")

    def weight_bytes(self) -> int:
        """Of the file's matrices; what the plugin makes of them in memory it does not tell."""
        return self._bytes

    def perplexity(self, text: TokenText, windows: int) -> Scored | None:
        return None

    def traits(self) -> dict[str, Any]:
        found = self._arithmetic
        notes = f"KV cache in {found['kv_cache']}, inputs of matrices in 8 bits by groups of {found['group']}"
        return {**super().traits(), "dtype": self._kind, "notes": f"{notes}, other arithmetic in {found['floats']}"}

    def versions(self) -> dict[str, str]:
        return {**super().versions(), "openvino-genai": self._arithmetic["version"]}

    def close(self) -> None:
        if not hasattr(self, "_server"):
            return
        for pipe in (self._server.stdin, self._server.stdout):
            assert pipe is not None
            pipe.close()
        self._server.kill()
        self._server.wait()
        self._errors.close()
