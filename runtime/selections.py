"""Which neurons each sequence decodes with: chosen from its prompt, kept beside its KV cache.

A `Selections` is an attribute of the cache object itself, so that it lives exactly as long as the sequences do, is
copied when a prompt's cache is copied, and follows every reordering that beam search or batching applies.
"""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..kernels.sparse import SlimMLP, SparseMLP
from ..predictors.expert_policies import CoreExperts
from ..predictors.importance import token_contributions
from ..predictors.policies import Clusters, Observation, PromptNeurons


@dataclass(frozen=True, eq=False)
class Observed:
    """What prefill adds up at one layer. down_norm: of each neuron's row of the down projection."""

    what: Observation
    down_norm: Tensor


#: a layer's MLP over lists of its neurons, int64 ``[k]`` for all rows, or ``[rows, k]``
Packer = Callable[[int, Tensor], SparseMLP | SlimMLP]


@dataclass(frozen=True, eq=False)
class SelectedNeurons:
    """What the sequences of a cache decode with, by layer: a list for all of them or, where they chose differently, one
    for each."""

    mlps: Mapping[int, SparseMLP | SlimMLP]

    @property
    def differ(self) -> bool:
        """Whether some sequences chose other neurons than others."""
        return any(mlp.lists is not None and mlp.lists.rows is not None for mlp in self.mlps.values())


class Selections:
    """The neurons that the sequences of one KV cache decode with.

    During prefill, `observe` adds up each prompt's scores; the first decode step settles them, into matrices of the
    chosen neurons or into lists over whole layers (`Prepared.selected`). A later prefill (the next turn) adds to the
    same scores and settles anew.
    """

    def __init__(
        self,
        owner: object,
        rows: int,
        observed: Mapping[int, Observed],
        policies: Mapping[int, PromptNeurons],
        clusters: Clusters | None,
        experts: Mapping[int, CoreExperts] | None = None,
    ) -> None:
        self.owner = owner  # the wrapping that made it: selections of an earlier one are not used
        self.rows = rows
        self._observed, self._policies, self._clusters = observed, policies, clusters
        self._core_experts = dict(experts or {})
        self._used: dict[int, Tensor] = {}  # by layer, sums of router weights, [rows, experts]
        self._allowed: dict[int, Tensor] = {}
        self._scores: dict[int, Tensor] = {}
        self._ties: dict[int, Tensor] = {}
        self._void: dict[int, Tensor] = {}  # per adaptive layer, tokens void less tokens not, [rows]
        self._void_rows: dict[int, Tensor | bool] = {}
        self._abstained: dict[int, Tensor] = {}  # by layer that looks at prompts, its verdicts, bool [rows]
        self._distinct: dict[int, Tensor] = {}  # by layer, the neurons of each distinct selection, [groups, kept]
        self._group_of_row: Tensor | None = None
        self._selected: SelectedNeurons | None = None
        self.packed_of: object = None  # the state of the weights that `_selected` was packed from

    def __deepcopy__(self, memo: dict[int, Any]) -> Selections:
        """A copied cache gets its own tallies; packed slices never change and are shared."""
        twin = Selections(self.owner, self.rows, self._observed, self._policies, self._clusters, self._core_experts)
        twin._used = dict(self._used)
        twin._scores, twin._ties = dict(self._scores), dict(self._ties)
        twin._void, twin._void_rows = dict(self._void), dict(self._void_rows)
        twin._abstained = dict(self._abstained)
        twin._distinct, twin._group_of_row, twin._selected = self._distinct, self._group_of_row, self._selected
        twin.packed_of = self.packed_of
        return twin

    # --- prefill

    def observe(self, layer: int, a: Tensor, valid: Tensor | None) -> None:
        """Tally a layer's activations ``[tokens of all rows, intermediate]`` of one prefill pass."""
        what, down_norm = self._observed[layer].what, self._observed[layer].down_norm
        flat = a.reshape(-1, a.shape[-1])
        scores = token_contributions(flat, what.score, what.alpha, down_norm).view(self.rows, -1, a.shape[-1])
        ties = flat.float().abs().view_as(scores)
        if valid is not None:
            scores, ties = scores * valid.unsqueeze(-1), ties * valid.unsqueeze(-1)
        previous = self._scores.get(layer)
        total, tie = scores.sum(1), ties.sum(1)
        self._scores[layer] = total if previous is None else previous + total
        self._ties[layer] = tie if previous is None else self._ties[layer] + tie
        self._group_of_row = None

    def observe_experts(self, layer: int, index: Tensor, weights: Tensor, count: int, valid: Tensor | None) -> None:
        """Tally which of `count` experts the tokens of one prefill pass went to, ``[tokens of all rows, top_k]`` with
        their weights."""
        dense = torch.zeros(len(index), count, dtype=torch.float32, device="cpu")
        dense.scatter_add_(1, index.cpu(), weights.float().cpu())
        by_row = dense.view(self.rows, -1, count)
        total = (by_row if valid is None else by_row * valid.cpu().unsqueeze(-1)).sum(1)
        previous = self._used.get(layer)
        self._used[layer] = total if previous is None else previous + total
        self._allowed.pop(layer, None)
        self._group_of_row = None

    def allowed_experts(self, layer: int) -> Tensor | None:
        """The experts that a layer's tokens may go to, bool ``[rows, experts]``; None: all, as no prompt was seen."""
        if layer not in self._used:
            return None
        if layer not in self._allowed:
            self._allowed[layer] = self._core_experts[layer].allowed(self._used[layer])
        return self._allowed[layer]

    @property
    def experts_differ(self) -> bool:
        """Whether some sequences keep other experts than others."""
        found = (self.allowed_experts(layer) for layer in self._used)
        # asked at every step: one sequence differs from nobody, and its layers need not be looked at
        return self.rows > 1 and any(allowed is not None and bool((allowed != allowed[:1]).any()) for allowed in found)

    def observe_void(self, layer: int, void: Tensor, valid: Tensor | None) -> None:
        """Tally on which tokens of one prefill pass an adaptive layer was void, bool ``[rows, length]``."""
        votes = void.to(torch.int64) * 2 - 1
        total = (votes if valid is None else votes * valid).sum(1)
        previous = self._void.get(layer)
        self._void[layer] = total if previous is None else previous + total
        self._void_rows.pop(layer, None)
        self._group_of_row = None

    def judge(self, layer: int, verdict: Tensor, seen: Tensor | None) -> None:
        """What a layer says of each prompt so far, bool ``[rows]``: whether nothing is to be said after it. The last
        pass over a prompt decides. seen: the rows that had a token in it; None: all."""
        verdict, before = verdict.cpu(), self._abstained.get(layer)
        if seen is not None and before is not None:
            verdict = torch.where(seen, verdict, before)
        self._abstained[layer] = verdict

    @property
    def abstained(self) -> Tensor | None:
        """After which prompts nothing is to be said, as any layer says: bool ``[rows]``; None where none looks."""
        return torch.stack(list(self._abstained.values())).any(0) if self._abstained else None

    # --- decode

    def void_rows(self, layer: int) -> Tensor | bool:
        """Whether an adaptive layer was void for most tokens of the prompt: of every row, of none, or where True in
        bool ``[rows, 1, 1]``."""
        found = self._void_rows.get(layer)
        if found is None:
            void = self._void[layer] > 0 if layer in self._void else torch.zeros(1, dtype=torch.bool, device="cpu")
            found = bool(void[0]) if bool((void == void[0]).all()) else void.view(-1, 1, 1)
            self._void_rows[layer] = found
        return found

    def selected(self, packer: Callable[[], Packer], without: Collection[int] = ()) -> SelectedNeurons:
        """What the rows decode with now: one and the same object until that changes. packer: asked for where that has
        to be packed. without: layers that run dense."""
        if self._group_of_row is None:
            self._settle()
        if self._selected is None:
            self._selected = self._pack(cast(Tensor, self._group_of_row), packer(), without)
        return self._selected

    def forget_packed(self) -> None:
        """The weights have changed: what was packed of them is packed anew."""
        self._selected = None

    def _settle(self) -> None:
        self._selected = None
        chosen = {
            layer: self._choose(layer, policy)
            for layer, policy in self._policies.items()
            if self._scored(layer, policy)
        }
        if not chosen:  # every row has the same neurons, all of them
            self._group_of_row = torch.zeros(self.rows, dtype=torch.int64, device="cpu")
            return
        every = torch.cat(list(chosen.values()), dim=1)
        if self.rows == 1:  # there is nothing to sort, which a GPU would be waited for
            distinct, self._group_of_row = every, every.new_zeros(1)
        else:
            distinct, self._group_of_row = every.unique(dim=0, return_inverse=True)
        lists = distinct.split([indices.shape[1] for indices in chosen.values()], dim=1)
        self._distinct = dict(zip(chosen, lists, strict=True))

    def _pack(self, group_of_row: Tensor, packed: Packer, without: Collection[int]) -> SelectedNeurons:
        alike, mlps = group_of_row.numel() == 1 or bool((group_of_row == group_of_row[0]).all()), {}
        wanted = int(group_of_row[0]) if alike else group_of_row  # read once, not once a layer
        for layer, distinct in self._distinct.items():
            if layer in without:
                continue
            mlps[layer] = packed(layer, distinct[wanted])
        return SelectedNeurons(mlps)

    def _anchor(self, layer: int, policy: PromptNeurons) -> int:
        """The layer whose scores the choice depends on."""
        return policy.observes(layer, self._clusters).layer

    def _scored(self, layer: int, policy: PromptNeurons) -> bool:
        """Whether the prompt went through what the choice depends on. A model that drafts for itself by its first
        layers has caches that no other layer has seen."""
        return self._anchor(layer, policy) in self._scores

    def _choose(self, layer: int, policy: PromptNeurons) -> Tensor:
        """Indices ``[rows, kept]`` of one layer."""
        anchor = self._anchor(layer, policy)
        return policy.select(self._scores[anchor], self._ties[anchor], self._clusters)

    # --- following the cache

    def take(self, index: Tensor) -> None:
        """Row i becomes what row `index[i]` was: beam reordering, repeating and selecting batch rows."""
        self.rows = int(index.shape[0])
        self._void_rows.clear()
        for tally in (self._scores, self._ties, self._void, self._abstained, self._used):
            for layer, value in tally.items():
                tally[layer] = value[index.to(value.device)]
        if self._used:
            self._allowed, self._selected = {}, None
        if self._group_of_row is not None:
            moved = self._group_of_row[index.to(self._group_of_row.device)]
            if not torch.equal(moved, self._group_of_row):
                self._group_of_row, self._selected = moved, None


# --- a cache with selections ----------------------------------------------------------------------------------------

_ATTRIBUTE = "_coreskip_selections"


def selections_of(cache: object, owner: object) -> Selections | None:
    """The selections that wrapping `owner` left on `cache`."""
    found = selections_in(cache)
    return found if found is not None and found.owner is owner else None


def selections_in(cache: object) -> Selections | None:
    """Whatever wrapping left them on `cache`."""
    found = getattr(cache, _ATTRIBUTE, None)
    return found if isinstance(found, Selections) else None


def attach(cache: Cache, selections: Selections) -> None:
    """Make `selections` follow `cache`: its methods that move or drop rows also move or drop the selections.

    The cache's class becomes a subclass of the same name rather than its instance getting bound methods: those would
    refer back to the cache and keep its keys and values in memory until the garbage collector comes around.
    """
    setattr(cache, _ATTRIBUTE, selections)
    if not isinstance(cache, _Followed):
        cache.__class__ = _followed_class(cast(Any, type(cache)))


def share_selections(cache: Cache | None, other: Cache) -> None:
    """Let passes over `other` decode with what was selected for `cache`."""
    found = getattr(cache, _ATTRIBUTE, None)
    if found is not None:
        setattr(other, _ATTRIBUTE, found)


class _Followed:
    """A KV cache whose selections follow it, and its copies. Pickled it is the plain cache, without them."""

    def __copy__(self) -> Any:
        twin = object.__new__(type(self))
        twin.__dict__.update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in vars(self).items() if name != _ATTRIBUTE}
        return copyreg._reconstructor, (type(self).__bases__[1], object, None), state  # type: ignore[attr-defined]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._take(lambda rows: beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._take(lambda rows: torch.arange(rows, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._take(lambda rows: torch.arange(rows, device="cpu")[torch.as_tensor(indices).cpu()])

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        vars(self).pop(_ATTRIBUTE, None)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if int(super().get_seq_length()) == 0:  # type: ignore[misc]
            vars(self).pop(_ATTRIBUTE, None)

    def _take(self, index: Callable[[int], Tensor]) -> None:
        found = vars(self).get(_ATTRIBUTE)
        if isinstance(found, Selections):
            found.take(index(found.rows).cpu())


@functools.cache
def _followed_class(cls: Any) -> Any:
    return type(cls.__name__, (_Followed, cls), {name: getattr(cls, name) for name in ("__module__", "__qualname__")})
