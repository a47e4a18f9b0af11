"""Keys and values of prompts read before, so that a prompt that begins alike, or is the same, is not read again.

Blocks are the chunks in which a scheduler reads prompts, and what is left at a prompt's end. A chunk's keys and values
depend on the tokens up to its end alone, and are computed by the same pass whoever reads it: what a text comes to is
the same to the bit with this and without. Therefore nothing is kept of tokens that decode steps made, whose arithmetic
is another, nor of prompts that also decide something else (core neurons) or whose layers forget (windows).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .kv_cache import library_class


@dataclass(frozen=True, eq=False)
class Block:
    """layers: keys and values of some tokens in each layer, [1, heads, tokens, size]. logits: ``[vocabulary]`` after
    the last token of a whole prompt, else None."""

    layers: list[tuple[Tensor, Tensor]]
    tokens: int
    logits: Tensor | None

    @property
    def nbytes(self) -> int:
        kept = [t for pair in self.layers for t in pair] + ([] if self.logits is None else [self.logits])
        return sum(t.nbytes for t in kept)


class PromptCache:
    """Blocks by the hash of all tokens up to their end; those used longest ago go first.

    limit: bytes of all blocks; 0: nothing is kept. chunk: tokens of a block.
    """

    def __init__(self, limit: int, chunk: int) -> None:
        self._limit, self._chunk = limit, chunk
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        self._stamp: object = None
        self.nbytes = 0

    def check(self, stamp: object) -> None:
        """Forgets everything if the model is not what it was: `stamp` is another object then; None: nobody knows."""
        if stamp is None or stamp is not self._stamp:
            self._blocks.clear()
            self._stamp, self.nbytes = stamp, 0

    def find(self, dense: bool, ids: Sequence[int]) -> list[Block]:
        """The blocks that a prompt begins with. The last token of a prompt is in none of them, unless there are logits
        after it. dense: whether it is read by the model as it was loaded, whatever the plan."""
        found: list[tuple[bytes, Block]] = []
        for key, end in self._keys(dense, ids):
            block = self._blocks.get(key)
            if block is None or (end == len(ids) and block.logits is None):
                break
            found.append((key, block))
        for key, _ in reversed(found):  # who is found through another goes before it
            self._blocks.move_to_end(key)
        return [block for _, block in found]

    def keep(self, dense: bool, ids: Sequence[int], cache: Any, begin: int, logits: Tensor | None) -> None:
        """Takes in a block: the last of `ids`, from `begin` on, whose keys and values `cache` has. logits: after them,
        where they are a whole prompt."""
        if self._stamp is None or self._limit == 0 or not _remembers_all(cache):
            return
        *_, (key, end) = self._keys(dense, ids)
        block = Block([_piece(layer, begin, end) for layer in cache.layers], end - begin, logits)
        self.nbytes += block.nbytes - (self._blocks[key].nbytes if key in self._blocks else 0)
        self._blocks[key] = block
        while self.nbytes > self._limit:
            self.nbytes -= self._blocks.popitem(last=False)[1].nbytes

    def _keys(self, dense: bool, ids: Sequence[int]) -> Iterator[tuple[bytes, int]]:
        """Of each block of a prompt, and where it ends."""
        key = b"dense" if dense else b""
        for begin in range(0, len(ids), self._chunk):
            end = min(begin + self._chunk, len(ids))
            key = hashlib.blake2b(key + array("q", ids[begin:end]).tobytes(), digest_size=32).digest()
            yield key, end


def filled(config: Any, blocks: Sequence[Block]) -> DynamicCache:
    """A KV cache that has these blocks."""
    cache = DynamicCache(config=config)
    for index in range(len(blocks[0].layers)):
        keys, values = (torch.cat([block.layers[index][i] for block in blocks], dim=2) for i in (0, 1))
        cache.update(keys, values, index)
    return cache


def _remembers_all(cache: Any) -> bool:
    layers: list[Any] = cache.layers if isinstance(cache, DynamicCache) else [None]
    return all(library_class(type(layer)) is DynamicLayer and layer.is_initialized for layer in layers)


def _piece(layer: Any, begin: int, end: int) -> tuple[Tensor, Tensor]:
    return layer.keys[:, :, begin:end].clone(), layer.values[:, :, begin:end].clone()
