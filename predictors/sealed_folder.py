"""Folders that hold one thing: a JSON document, sealed by checksums, and tensors beside it. A Plan's, neuron scores'.

What is damaged, edited, truncated or of a newer format raises one clear error before anything is made of it. Nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from . import files
from .checks import path_of
from .errors import CoreskipError
from .sealed import seal, unseal

_T = TypeVar("_T")


@dataclass(frozen=True)
class SealedFolder:
    """A kind of folder.

    Attributes:
        word: what it holds, in one word, which names its two files and its format: "plan".
        name: the same for people, with its article: "a plan".
        version: the newest that can be read.
        maker: the command that makes one, for who has none; "" where there is no such command.
        error: what is raised where one cannot be read.
        inside: a folder within others where one may be found, too.
    """

    word: str
    name: str
    version: int
    maker: str
    error: type[CoreskipError]
    inside: str | None = None

    @property
    def json(self) -> str:
        return f"{self.word}.json"

    @property
    def tensors(self) -> str:
        return f"{self.word}.safetensors"

    @property
    def _again(self) -> str:
        return f"make the {self.word} again"

    def write(
        self,
        path: str | os.PathLike[str],
        document: dict[str, Any],
        tensors: dict[str, Tensor],
        version: int | None = None,
    ) -> None:
        """Write the folder `path`. Atomic: an older one of its kind there survives any failure whole.

        version: the oldest that says it all, so that older readers take what they understand; by default the newest.

        Raises:
            CoreskipError: `path` is something else, or cannot be written (no room, no permission).
        """
        target = path_of(path, self.name)
        self.check_target(target)
        # layers may share a tensor, which safetensors refuses
        data = safetensors.torch.save({name: t.cpu().contiguous().clone() for name, t in tensors.items()})
        checksum = hashlib.sha256(data).hexdigest()
        about = {"format": f"coreskip.{self.word}", "version": version or self.version}
        sealed = seal({**about, **document, "tensors_sha256": checksum})
        try:
            with files.replaced_folder(target) as draft:
                files.write_durably(draft / self.tensors, data)
                files.write_durably(draft / self.json, sealed)
        except OSError as error:
            raise CoreskipError(
                f"cannot write the {self.word} {target}: {error.strerror or error}; what was there is unchanged"
            ) from None

    def read(self, path: str | os.PathLike[str], decode: Callable[[dict[str, Any], dict[str, Tensor]], _T]) -> _T:
        """What `decode` makes of the document and the tensors in the folder `path`.

        Raises:
            the kind's error: not such a folder, of a newer format, truncated, edited or inconsistent.
        """
        folder = path_of(path, self.name)
        if not (folder / self.json).exists() and self.inside and (folder / self.inside / self.json).exists():
            folder = folder / self.inside
        try:
            text, data = files.read_together(folder, (self.json, self.tensors))
        except OSError as error:
            if not folder.is_dir():
                hint = f": make one with `{self.maker} -o {folder}`" if self.maker else ""
                raise self.error(f"there is no {self.word} at {folder}{hint}") from None
            raise self.error(
                f"{folder} is not {self.name}: {Path(str(error.filename)).name}: {error.strerror}"
            ) from None
        document = unseal(
            text, folder / self.json, kind=f"coreskip.{self.word}", version=self.version,
            foreign=f"a coreskip {self.word}", again=self._again, error=self.error,
        )  # fmt: skip
        if hashlib.sha256(data).hexdigest() != document.get("tensors_sha256"):
            raise self.error(f"{folder / self.tensors} is truncated or was edited: {self._again}")
        try:
            return decode(document, safetensors.torch.load(data))
        # whatever a sealed but senseless document trips over (a missing key, a number where a list belongs) means one
        # thing to the user
        except (safetensors.SafetensorError, CoreskipError, KeyError, TypeError, ValueError, AttributeError) as error:
            if self.error is not CoreskipError and isinstance(error, self.error):
                raise
            raise self.error(f"{folder} is not a well-formed {self.word} ({error}): {self._again}") from None

    def check_target(self, target: Path) -> None:
        """Raise `CoreskipError` where one must not or cannot be written: over a file, into a folder with other things
        in it, or without permission. Of a link, the folder behind it is meant."""
        if not target.name:
            raise CoreskipError(f"{str(target)!r} cannot name {self.name}; give a folder name such as my.{self.word}")
        try:
            if target.exists() and not target.is_dir():
                raise CoreskipError(f"{target} exists and is not a {self.word} folder; choose another name")
            if target.is_dir() and {entry.name for entry in target.iterdir()} - {self.json, self.tensors}:
                raise CoreskipError(f"{target} exists and holds other files than a {self.word}'s; choose another name")
        except OSError as error:
            raise CoreskipError(f"cannot write the {self.word} {target}: {error.strerror}") from None
        files.check_folder(target)
