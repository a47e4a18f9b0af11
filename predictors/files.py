"""Files and folders that are written whole or not at all, whoever is killed meanwhile, and read within bounds.

What is written goes into a draft beside its place first: a hidden file or folder that its writer holds a lock on, so
that the drafts of writers that were killed are told from those of writers at work, and are removed by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import secrets
import select
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .errors import CoreskipError

try:
    import fcntl
except ImportError:  # Windows: without locks, drafts of killed writers stay
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("coreskip")

_LOCKS = fcntl is not None
STDOUT = Path("-")
SILENCE_S = 30.0  # a pipe into which nothing is written for so long is not waited for
_TRIES = 1000  # of what another writer may undo; each is over within a millisecond
_PIECE = 1 << 20


# --- files ------------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all. ``-`` is stdout; of a link the file behind it is written, and into
    pipes and devices as they are.

    Raises:
        CoreskipError: the file cannot be written.
    """
    data = text.encode("utf-8", "backslashreplace")  # a command line may hold bytes that are no text
    try:
        if _is_stdout(path):
            sys.stdout.write(data.decode())
            sys.stdout.flush()
        elif _is_stream(_kind(path)):
            _send(path, data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except CoreskipError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise CoreskipError(f"cannot write {path}: {_reason(error)}") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all; of a link the file behind it.

    Raises:
        CoreskipError: the file cannot be written.
    """
    try:
        _replace(Path(os.path.realpath(path)), data)
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise CoreskipError(f"cannot write {path}: {_reason(error)}") from None


def _send(path: Path, data: bytes) -> None:
    """Into a pipe or a device as it is. A pipe is opened once: whoever reads it takes the first close for its end."""
    try:
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.set_blocking(pipe, True)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        logger.info("waiting for somebody to read the pipe %s", path)
        pipe = os.open(path, os.O_WRONLY)
    with open(pipe, "wb") as file:
        file.write(data)


def append_line(path: Path, line: str) -> None:
    """Add a line to a UTF-8 file, which is made if it is not there. Where a writer was killed in the middle of the last
    one, that is cut off; several processes may add lines.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("a+b") as file:
        if _LOCKS:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")


def check_file(path: Path, *, regular: bool = False) -> None:
    """Raise the `CoreskipError` with which `write_text` would fail, by trying: before hours of work, not after.

    Args:
        regular: it is read again: neither stdout nor a pipe or a device will do.
    """
    try:
        kind = 0 if _is_stdout(path) else _kind(path)
        if _is_stdout(path) or _is_stream(kind):
            if regular:
                raise CoreskipError(f"{path} is not a file that can be read again; give the name of a file")
            return
        if kind == 0 and not path.parent.is_dir() and not path.is_symlink():
            raise CoreskipError(f"there is no folder {path.parent} to write {path.name} into")
        real = Path(os.path.realpath(path))
        if kind and not os.access(real, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with tempfile.TemporaryFile(dir=real.parent):
            pass
    except CoreskipError:
        raise
    except (OSError, ValueError) as error:
        raise CoreskipError(f"cannot write {path}: {_reason(error)}") from None


def keep(write: Callable[[Path], object], path: Path) -> None:
    """``write(path)``; where that fails after all, what was computed is written into a temporary folder.

    Raises:
        CoreskipError: it says where the result is now.
    """
    try:
        write(path)
    except CoreskipError as error:
        try:
            spare = Path(tempfile.mkdtemp(prefix="coreskip-")) / path.name
            write(spare)
        except (OSError, CoreskipError):
            raise error from None
        raise CoreskipError(f"{error}; what was to be written is in {spare}") from None


def read_bytes(path: Path, most: int) -> bytes:
    """A file's or a pipe's first `most` bytes. Never waits without end, never reads a device.

    Raises:
        OSError: there is no such file, it cannot be read, or it is neither a file nor a pipe.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            raise OSError(errno.EINVAL, "it is a device, not a file", str(path))
        pieces = []
        while most > 0:
            if stat.S_ISFIFO(mode) and not select.select([file], [], [], SILENCE_S)[0]:
                raise OSError(errno.EAGAIN, f"nothing was written into this pipe for {SILENCE_S:g} seconds", str(path))
            piece = file.read(min(most, _PIECE))
            if not piece:
                break
            pieces.append(piece)
            most -= len(piece)
        return b"".join(pieces)


def read_text(path: Path, what: str, most: int = 1 << 28) -> str:
    """The text of a UTF-8 file or pipe of at most `most` bytes; `what` says in errors what it was to be.

    Raises:
        CoreskipError: it cannot be read, is no text, or is longer.
    """
    try:
        data = read_bytes(path, most + 1)
        if len(data) <= most:
            return data.decode("utf-8")
    except UnicodeDecodeError:
        raise CoreskipError(f"{path} is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise CoreskipError(f"cannot read {what} {path}: {_reason(error)}") from None
    raise CoreskipError(f"cannot read {what} {path}: it is longer than {most / 1e6:.0f} MB")


def _is_stdout(path: Path) -> bool:
    """Whether `path` is ``-``, or another name of what stdout was redirected to: replacing that would lose the rest."""
    if path == STDOUT:
        return True
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    return False


def _kind(path: Path) -> int:
    """The type of file behind the path, 0 where there is none.

    Raises:
        CoreskipError: a type that nothing should be written to.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return 0
    if kind == stat.S_IFDIR:
        raise CoreskipError(f"{path} is a folder; give the name of a file")
    if kind in (stat.S_IFBLK, stat.S_IFSOCK):
        raise CoreskipError(f"{path} is a disk or a socket, which is not written to; give the name of a file")
    return kind


def _is_stream(kind: int) -> bool:
    return kind in (stat.S_IFIFO, stat.S_IFCHR)


def _replace(real: Path, data: bytes) -> None:
    remove_dead(real)
    if real.exists() and not os.access(real, os.W_OK):  # a rename would replace what its owner has locked
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    with _draft(real, folder=False) as draft:
        if real.exists():
            shutil.copymode(real, draft)
            with contextlib.suppress(OSError):  # only root may give a file away
                os.chown(draft, real.stat().st_uid, real.stat().st_gid)
        write_durably(draft, data)
        os.replace(draft, real)
        _sync(real.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file; when this returns, the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Have the disk know what is in the folder."""
    with contextlib.suppress(OSError):  # not every system can; the content itself is on the disk already
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


# --- folders ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A draft to fill, which takes the place of the folder `target` at the end, and is removed where that is not
    reached. On Linux the two change places in one step, and at no time is there no folder; elsewhere a moment is
    bridged by `read_together`, which then reads the older one from where it was put aside.

    Raises:
        OSError: no room, no permission.
    """
    target = Path(os.path.realpath(target))  # of a link, the folder behind it
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(target)
    with _draft(target, folder=True) as draft:
        yield draft
        _sync(draft)
        _install(draft, target)
        remove_dead(target)  # what was put aside by a writer killed between its renames was the only copy until now
        _sync(target.parent)


def check_folder(target: Path) -> None:
    """Raise the `CoreskipError` with which writing the folder would fail for want of permission, by trying."""
    try:
        target = Path(os.path.realpath(target))
        parent = target.parent
        while not parent.exists():
            parent = parent.parent
        if target.is_dir() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if os.path.ismount(target):
            raise OSError(errno.EBUSY, "it is a mount point, which cannot be replaced; name a folder in it")
        with tempfile.TemporaryFile(dir=parent):  # nothing that could be left behind
            pass
    except (OSError, ValueError) as error:
        raise CoreskipError(f"cannot write {target}: {_reason(error)}") from None


def read_together(folder: Path, names: Sequence[str]) -> list[bytes]:
    """The files of one state of a folder that `replaced_folder` may replace meanwhile.

    Raises:
        OSError: there is no such folder, or a file of it is missing or cannot be read.
    """
    for attempt in range(_TRIES):
        real = Path(os.path.realpath(folder))
        aside = [] if real.exists() else _hidden(real, "old")
        try:
            return _read_at_once(aside[0] if aside else real, names)
        except _Replaced:
            pass
        except FileNotFoundError:
            if not aside and attempt > 0:  # a second look: a writer may have been between its two renames
                raise
        time.sleep(0.001)
    raise OSError(errno.EBUSY, "it is replaced all the time", str(folder))


class _Replaced(Exception):
    """The folder went while it was read: there is a newer one."""


def _read_at_once(folder: Path, names: Sequence[str]) -> list[bytes]:
    if os.open not in os.supports_dir_fd:
        return [_whole(folder / name, None) for name in names]
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return [_whole(folder / name, descriptor) for name in names]
    except FileNotFoundError:
        # as long as the descriptor is open, its number is not given to another folder
        if folder.exists() and os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise
        raise _Replaced from None
    finally:
        os.close(descriptor)


def _whole(path: Path, folder: int | None) -> bytes:
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags) if folder is None else os.open(path.name, flags, dir_fd=folder)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a file", str(path))
        return file.read()


def _install(draft: Path, target: Path) -> None:
    """Put `draft` where `target` is; where that is a folder with something in it, it is at `draft` afterwards."""
    for _ in range(_TRIES):
        try:
            os.rename(draft, target)  # over nothing, or over an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            if _exchange(draft, target):
                return
            old = target.with_name(draft.name.replace(".draft", ".old"))
            os.rename(target, old)
        except FileNotFoundError:  # another writer was between its two renames
            continue
        try:
            os.rename(draft, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                os.rename(old, target)
                raise
        finally:
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):  # an old kernel, or a file system without it
        return False
    raise OSError(code, os.strerror(code), str(other))


# --- drafts -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _draft(target: Path, *, folder: bool) -> Iterator[Path]:
    """An empty draft beside `target`, locked; what is there at the end is removed."""
    draft, lock = _locked_draft(target, folder)
    try:
        yield draft
    finally:
        _remove(draft)
        os.close(lock)


def _locked_draft(target: Path, folder: bool) -> tuple[Path, int]:
    for _ in range(_TRIES):
        # part of the name: with all of a long one, the draft's would be too long for the file system
        draft = target.with_name(f".{target.name[:80]}.{secrets.token_hex(4)}.draft")
        if folder:
            draft.mkdir()
        else:
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        lock = _lock(draft)
        if lock is not None:
            return draft, lock
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock; None where another process has it or has removed the path."""
    if not _LOCKS:
        return os.open(os.devnull, os.O_RDONLY)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except BlockingIOError:
        pass
    except OSError:  # a file system without locks: nobody can take the draft for a dead one
        return descriptor
    os.close(descriptor)
    return None


def remove_dead(target: Path) -> None:
    """Remove what writers of `target` left behind that were killed."""
    if not _LOCKS:
        return
    for path in [*_hidden(target, "draft"), *(_hidden(target, "old") if target.exists() else ())]:
        with contextlib.suppress(OSError):  # another process may be at it, too
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(descriptor)


def _hidden(target: Path, ending: str) -> list[Path]:
    name = re.compile(rf"\.{re.escape(target.name[:80])}\.[0-9a-f]{{8}}\.{ending}")
    try:
        return [target.with_name(found) for found in os.listdir(target.parent) if name.fullmatch(found)]
    except (OSError, ValueError):
        return []


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
