"""The tests as other CPUs would run them: ``python tests/isas.py [--times N] [arguments of pytest]``.

torch, oneDNN and the compiled kernels each choose vector code for the CPU that they find, and round accordingly. This
turns each of them down to everything that this machine has, in every combination, in processes of their own.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time

import torch

from coreskip.kernels import cpu

# In ascending order, with oneDNN's name for what comes with it. A switch set higher than the machine ends in SIGILL.
_ATEN = {"DEFAULT": ("default", "SSE41"), "AVX2": ("avx2", "AVX2"), "AVX512": ("avx512", "AVX512_CORE_AMX")}


def combinations() -> list[dict[str, str]]:
    names = list(_ATEN)
    found = names[: names.index(torch.backends.cpu.get_cpu_capability()) + 1]
    switches = {
        "ATEN_CPU_CAPABILITY": [_ATEN[name][0] for name in found],
        "ONEDNN_MAX_CPU_ISA": [_ATEN[name][1] for name in found],
        "CORESKIP_CPU": cpu.supported(),
    }
    return [dict(zip(switches, values, strict=True)) for values in itertools.product(*switches.values())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1, help="how often each combination is run")
    options, arguments = parser.parse_known_args()
    failed = 0
    for turn, switches in itertools.product(range(options.times), combinations()):
        start = time.perf_counter()
        command = [sys.executable, "-m", "pytest", *arguments]
        done = subprocess.run(command, env=os.environ | switches, capture_output=True, text=True)
        failed += done.returncode != 0
        named = " ".join(f"{name}={value}" for name, value in switches.items())
        last = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        print(f"{turn + 1}  {named}: {last} ({time.perf_counter() - start:.0f} s)", flush=True)
        if done.returncode != 0:
            print(done.stdout, done.stderr, sep="\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
