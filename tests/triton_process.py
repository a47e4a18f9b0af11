"""A process of its own that executes scripts: Triton's interpreter is chosen when Triton is imported, and takes longer
to start than most tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Executes the scripts that come in, each with a fresh copy of what was defined, and answers with what went wrong.
_SERVER = """
import json, sys, traceback
defined = dict(globals())
for line in sys.stdin:
    try:
        exec(json.loads(line), dict(defined))
        print(json.dumps(None), flush=True)
    except BaseException:
        print(json.dumps(traceback.format_exc()), flush=True)
"""


@contextmanager
def scripts(setup: str, *, interpreted: bool) -> Iterator[Callable[[str], None]]:
    """What runs a script after `setup` in the process, and fails where the script does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    tests = str(Path(__file__).parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [tests, environment.get("PYTHONPATH")]))
    command = [sys.executable, "-c", setup + _SERVER]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        given, made = process.stdin, process.stdout

        def run(script: str) -> None:
            given.write(json.dumps(script) + "\n")
            given.flush()
            wrong = json.loads(made.readline())
            assert wrong is None, wrong[-3000:]

        yield run
        given.close()
