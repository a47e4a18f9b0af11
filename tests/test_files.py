"""Files: whole or not at all, whoever is killed; read within bounds; checked before the work; nothing left behind."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from tiny_models import plan_of, tiny

from coreskip.bench import throughput
from coreskip.bench.clock import Generation
from coreskip.bench.processes import Worker
from coreskip.bench.runner import Job
from coreskip.bench.settings import Settings, settings_of
from coreskip.bench.workloads import prompts
from coreskip.cli import main
from coreskip.predictors import calibration, files
from coreskip.predictors.calibration import read_text
from coreskip.predictors.errors import CoreskipError, PlanError
from coreskip.predictors.plan import Plan
from coreskip.runtime.search import Journal

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork, links and pipes")
not_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# --- one file


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / ("n" * 240 + ".json")  # of the longest names, a draft's would be too long
    files.check_file(file)
    assert not file.exists()
    files.write_text(file, "one\n")
    file.chmod(0o640)
    files.write_text(file, "zwei é\n")
    assert file.read_bytes() == "zwei é\n".encode()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert hidden(tmp_path) == []


@posix
def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "rows.jsonl", tmp_path / "link"
    link.symlink_to(target)
    for text in ("made\n", "made again\n"):  # a link to nothing, and one to a file
        files.check_file(link)
        files.write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    nowhere = tmp_path / "nowhere"
    nowhere.symlink_to(tmp_path / "none" / "x")
    for broken in (loop, nowhere):
        for call in (files.check_file, lambda path: files.write_text(path, "x")):
            with pytest.raises(CoreskipError, match=f"cannot write .*{broken.name}"):
                call(broken)
        assert broken.is_symlink()


@posix
def test_pipes_and_devices_are_written_to(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    files.check_file(fifo)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    files.write_text(fifo, "through\n" * 50_000)
    reader.join()
    assert read == [b"through\n" * 50_000]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    files.check_file(Path("/dev/null"))
    files.write_text(Path("/dev/null"), "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(CoreskipError, match="not a file that can be read again"):
        files.check_file(fifo, regular=True)


@posix
def test_who_reads_a_pipe_sees_no_end_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that has opened the pipe already must not take a first look at it for its end."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    waiting = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    opened, plain = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *flags: opened.append(path) or plain(path, *flags))
    files.write_text(fifo, "through")
    assert opened == [fifo]
    assert os.read(waiting, 100) == b"through"
    os.close(waiting)


def test_a_dash_is_stdout(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.check_file(Path("-"))
    files.write_text(Path("-"), "rows\n")
    assert capsys.readouterr().out == "rows\n"
    assert list(tmp_path.iterdir()) == []


@posix
def test_what_stdout_was_redirected_to_is_not_replaced(tmp_path: Path) -> None:
    """Else all that is printed afterwards would go into a file without a name."""
    code = (
        "from pathlib import Path; from coreskip.predictors.files import write_text\n"
        "print('before', flush=True); write_text(Path('/dev/stdout'), 'rows\\n'); print('after')"
    )
    out = tmp_path / "out.txt"
    with out.open("w") as stdout:
        subprocess.run([sys.executable, "-c", code], stdout=stdout, check=True, env=here())
    assert out.read_text() == "before\nrows\nafter\n"


def here() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_wrong_targets(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target, match in (
        (tmp_path, "is a folder"),
        (Path(""), "is a folder"),
        (tmp_path / "none" / "x", "no folder|No such"),
        (tmp_path / "file" / "x", "no folder|Not a directory"),
        (tmp_path / ("n" * 300), "too long"),
        (tmp_path / "a\0b", "null"),
    ):
        with pytest.raises(CoreskipError, match=match) as caught:
            files.check_file(target)
        assert "\n" not in str(caught.value)
        with pytest.raises(CoreskipError):
            files.write_text(target, "x")
    assert hidden(tmp_path) == []


@not_root
def test_permissions_show_before_the_work(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    (tmp_path / "read.only").touch(mode=0o400)
    for target in (locked / "x", tmp_path / "read.only"):
        with pytest.raises(CoreskipError, match="cannot write"):
            files.check_file(target)
        with pytest.raises(CoreskipError, match="cannot write"):
            files.write_text(target, "x")
    with pytest.raises(CoreskipError, match="cannot write"):
        files.check_folder(locked / "new" / "my.plan")


KILLED_WRITER = """
import os, random, signal, sys, time
from pathlib import Path
from coreskip.predictors.files import write_text
file = Path(sys.argv[1])
write_text(file, "0" * 300_000)
bad = 0
for turn in range(40):
    pid = os.fork()
    if pid == 0:
        while True:
            write_text(file, str(turn % 10) * 300_000)
    time.sleep(random.uniform(0.001, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    text = file.read_text()
    bad += len(text) != 300_000 or len(set(text)) != 1
print(bad, len(os.listdir(file.parent)))
write_text(file, "last")
print(os.listdir(file.parent))
"""


@posix
def test_killed_writers_leave_whole_files_and_no_drafts(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path / "x.json")],
        capture_output=True, text=True, env=here(), check=False,
    )  # fmt: skip
    assert run.stdout.splitlines()[-1] == "['x.json']", run.stderr
    bad, left = map(int, run.stdout.split()[:2])
    assert bad == 0
    assert left <= 2, "the one that was killed last at most"


# --- plans


STRESS = """
import os, random, signal, sys, time
from pathlib import Path
from coreskip.predictors import files
from coreskip.predictors.plan import Plan
mode, folder, exchange = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "exchange"
if not exchange:
    files._exchange = lambda one, other: False
plans = [Plan.load(folder / "a.plan"), Plan.load(folder / "b.plan")]
texts = [str(plan) for plan in plans]
target = folder / "work" / "my.plan"
plans[0].save(target)

def writer(seed):
    pid = os.fork()
    if pid == 0:
        count = seed
        while True:
            plans[count % 2].save(target)
            count += 1
    return pid

def check():
    try:
        return str(Plan.load(target)) not in texts
    except Exception as error:
        print("failed:", error, file=sys.stderr)
        return True

bad = most = 0
if mode == "killed":
    for turn in range(40):
        pid = writer(turn)
        time.sleep(random.uniform(0.001, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        bad += check()
        most = max(most, len(os.listdir(target.parent)))
else:
    pids = [writer(seed) for seed in range(int(mode))]
    for _ in range(300):
        bad += check()
        most = max(most, len(os.listdir(target.parent)))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
plans[1].save(target)
print(bad, most, os.listdir(target.parent), str(Plan.load(target)) == texts[1])
"""


@posix
@pytest.mark.parametrize("way", ["exchange", "without"])
@pytest.mark.parametrize("mode", ["killed", "1", "2"])
def test_a_plan_is_always_there_whole(tmp_path: Path, mode: str, way: str) -> None:
    """Savers that are killed, a reader beside one saver and beside two; also where folders cannot be exchanged."""
    model = tiny("llama")
    plan_of(model, "static").save(tmp_path / "a.plan")
    plan_of(model, "similar").save(tmp_path / "b.plan")
    run = subprocess.run(
        [sys.executable, "-c", STRESS, mode, str(tmp_path), way],
        capture_output=True, text=True, env=here(), check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    bad, most, rest = run.stdout.split(maxsplit=2)
    assert (bad, rest.strip()) == ("0", "['my.plan'] True"), (run.stdout, run.stderr)
    assert int(most) <= 8, "drafts pile up"


@posix
def test_a_plan_behind_a_link_is_replaced_there(tmp_path: Path) -> None:
    plan = plan_of(tiny("llama"), "static")
    plan.save(tmp_path / "real.plan")
    (tmp_path / "link.plan").symlink_to("real.plan")
    other = plan_of(tiny("llama"), "similar")
    other.save(tmp_path / "link.plan")
    assert (tmp_path / "link.plan").is_symlink()
    assert str(Plan.load(tmp_path / "real.plan")) == str(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.plan", "real.plan"]


@posix
def test_a_plan_of_pipes_does_not_hang(tmp_path: Path) -> None:
    folder = tmp_path / "x.plan"
    folder.mkdir()
    os.mkfifo(folder / "plan.json")
    os.mkfifo(folder / "plan.safetensors")
    with pytest.raises(PlanError, match="not a plan"):
        Plan.load(folder)


def test_a_folder_without_its_files_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"is not a plan: plan\.json"):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match="there is no plan at"):
        Plan.load(tmp_path / "none")


def test_a_plan_that_cannot_be_saved_is_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "spare"))
    (tmp_path / "spare").mkdir()
    plan, target = plan_of(tiny("llama"), "static"), tmp_path / "my.plan"
    install = files._install

    def full(draft: Path, at: Path) -> None:
        if at == target:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        install(draft, at)

    monkeypatch.setattr(files, "_install", full)
    with pytest.raises(CoreskipError, match=r"No space left on device.* is in (.*)my\.plan$") as caught:
        files.keep(plan.save, target)
    assert str(Plan.load(str(caught.value).rsplit(" is in ", 1)[1])) == str(plan)
    assert not target.exists()


# --- reading within bounds


@posix
def test_texts_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SILENCE_S", 0.2)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "utf16.txt").write_bytes("Hello there".encode("utf-16-le"))
    for path, match in (
        (Path("/dev/zero"), "it is a device"),
        (fifo, "nothing was written into this pipe"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "utf16.txt", "null characters"),
    ):
        for read in (read_text, lambda path: settings_of(model=None, text=path), lambda path: prompts((), path)):
            with pytest.raises(CoreskipError, match=match) as caught:
                read(path)
            assert "\n" not in str(caught.value)
            if match == "null characters":
                break


@posix
def test_pipes_are_read_and_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def reading(text: str) -> str:
        writer = subprocess.Popen([sys.executable, "-c", f"open({str(fifo)!r}, 'w').write({text})"])
        try:
            return read_text(fifo)
        finally:
            writer.kill()
            writer.wait()

    assert reading("'short' + chr(10)") == "short\n"
    monkeypatch.setattr(calibration, "MOST_CHARACTERS", 9_001)
    with caplog.at_level(logging.WARNING, logger="coreskip"):
        assert reading("chr(233) * 300_000") == "é" * 4_500
    assert "only the first" in caplog.text


# --- searches that go on


def test_journals_are_checked_first_and_lost_last(llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "search.jsonl"
    for target, match in ((tmp_path, "is a folder"), (tmp_path / "no" / "x", "no folder"), (Path("-"), "read again")):
        with pytest.raises(CoreskipError, match=match):
            Journal(target)
    one, two = Journal(file), Journal(file)
    one.add("a", {"kl": 1})
    two.add("b", {"kl": 2})
    with file.open("a") as handle:
        handle.write('{"key": "cut of')
    one.add("c", {"kl": 3})
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["a", "b", "c"]
    file.unlink()
    file.mkdir()
    with caplog.at_level(logging.WARNING, logger="coreskip"):
        one.add("d", {"kl": 4})  # a search of an hour is not lost by that
    assert "the search goes on without" in caplog.text
    assert one.get("d") == {"kl": 4}


# --- the command line


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, ""), err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def test_what_cannot_be_written_shows_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("coreskip.runtime.load.load", load)
    monkeypatch.setattr("coreskip.bench.throughput.run", load)
    plan, none = str(tmp_path / "a.plan"), str(tmp_path / "none" / "x")
    plan_of(tiny("llama"), "static").save(plan)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "not.gguf").write_text("mine")
    for words, match in (
        (["analyze", "-o", str(tmp_path / "file")], "not a plan folder"),
        (["analyze", "-o", str(tmp_path / "file" / "x.plan")], "cannot write"),
        (["analyze", "-o", str(tmp_path / "b.plan"), "--budget", "kl<1", "--resume", none], "no folder"),
        (["analyze", "-o", str(tmp_path / "b.plan"), "--budget", "kl<1", "--resume", str(tmp_path)], "is a folder"),
        (["analyze", "-o", str(tmp_path / "b.plan"), "--text", "/dev/zero"], "it is a device"),
        (["eval", "--plan", plan, "--json", none], "no folder"),
        (["eval", "--plan", plan, "--json", str(tmp_path)], "is a folder"),
        (["bench", "--json", none], "no folder"),
        (["bench", "--gguf", none], "no file"),
        (["bench", "--gguf", str(tmp_path / "not.gguf")], "not a GGUF file"),
        (["bench", "--text", "/dev/zero"], "it is a device"),
        (["bench", "--prompts", "/dev/zero"], "it is a device"),
        (["bench", "report", str(tmp_path / "file"), "-o", none], "no folder"),
        (["bench", "report", "/dev/zero"], "it is a device"),
        (["bench", "kernels", "--json", none], "no folder"),
    ):
        assert match in fails(capsys, *words), words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.plan", "file", "not.gguf"]


# --- processes


def test_sigterm_keeps_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("needs POSIX signals")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        runner = _Runner(number)
        outcome = throughput.run(
            Settings(jobs=[Job("hf", "float32")], prompts=prompts(("prose",)), rounds=9, tokens=16, windows=0),
            lambda job, runner=runner: runner,
        )
        assert outcome.interrupted
        assert [row.samples for row in outcome.rows] == [3]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class _Runner:
    """Counts; in the fourth round the process is signalled."""

    def __init__(self, number: int) -> None:
        self._number, self._generations = number, 0

    def __call__(self, method: str, *arguments: Any) -> Any:
        answers: dict[str, Callable[[], Any]] = {
            "encode": lambda: [[1, 2, 3]],
            "regrets": lambda: [0.0],
            "read_gb_s": lambda: 10.0,
            "weight_bytes": lambda: 1000,
            "memory": lambda: 1000,
            "traits": lambda: {"dtype": "float32", "method": "dense", "keep": 1.0, "neurons_skipped": 0.0},
            "versions": dict,
            "generate": lambda: self._generate(arguments[1]),
        }
        return answers.get(method, lambda: None)()

    def _generate(self, tokens: int) -> Generation:
        self._generations += 1
        if self._generations == 6:  # two before the rounds
            os.kill(os.getpid(), self._number)
        return Generation(list(range(tokens)), 0.1, [0.01] * (tokens - 1))

    def close(self) -> None:
        pass


PARENT = """
import signal, sys
from coreskip.bench.processes import MACHINE, Worker
from coreskip.bench.runner import Job
if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    worker = Worker(Job(MACHINE, "float32"))
    worker("read_gb_s")
    print(worker._process.pid, flush=True)
    while True:
        worker("read_gb_s")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends workers on Linux alone")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_workers_end_with_their_parent(tmp_path: Path, number: int) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=here()) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(number)
        parent.wait(20)
    for _ in range(100):
        if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    worker.kill()
    pytest.fail("the worker goes on without its parent")


def test_a_worker_that_is_busy_is_not_waited_for() -> None:
    worker = Worker(Job("machine", "float32"))
    worker._pipe.send(("read_gb_s", ()))
    worker._answers_due += 1  # as an interruption leaves it
    start = time.perf_counter()
    worker.close()
    assert time.perf_counter() - start < 5
    assert worker._process.exitcode is not None


def test_documents_are_made_by_the_same_rules(tmp_path: Path) -> None:
    from coreskip.cli import cli

    document = tmp_path / "README.md"
    document.write_text("nothing to fill\n")
    done = CliRunner().invoke(cli, ["bench", "tables", str(document), str(tmp_path)])
    assert (done.exit_code, document.read_text()) == (0, "nothing to fill\n")
