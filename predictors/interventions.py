"""What a plan changes about a layer to switch a skill off: in prompts and in decode steps alike.

Other policies say what a decode step leaves out, and leave prompts as they are. A skill would come back in from such a
prompt, whose keys and values every later token attends to: therefore an intervention is no such policy, but has a field
of its own in a plan's layers. An intervention is one dataclass, registered under the name that plans save. It says
where in an MLP it acts (`Site`); runtime/behaviour.py carries it out there. Nothing else tests which one it is.

What is here follows "Effective Skill Unlearning through Intervention and Abstention" (Li, Sun, Weng, NAACL 2025, arXiv
2503.21730) and its authors' code; every class says where it deviates.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .checks import check_above_zero
from .errors import PlanError


class Site(Enum):
    """Where in an MLP an intervention acts."""

    NOWHERE = "nowhere"
    PRE_ACTIVATION = "pre-activation"  # what the activation function is given: of a gated MLP the gate's output
    ACTIVATION = "activation"  # what the down projection is given
    PROMPT = "prompt"  # the same, of a prompt's last token: it is looked at, and left as it is


class Intervention:
    """What is changed about one layer's MLP.

    Attributes:
        name: what a saved plan calls it.
        site: where it acts.
    """

    name: ClassVar[str]
    site: ClassVar[Site]

    def check(self, width: int) -> None:
        """Raise `PlanError` where it does not fit an MLP of `width` neurons."""

    def changed(self, values: Tensor) -> Tensor:
        """What becomes of values ``[..., at least width]`` at its site, in their own dtype."""
        raise NotImplementedError

    def abstains(self, keys: Tensor) -> Tensor:
        """Of `Site.PROMPT`: whether nothing is to be said after prompts with these keys ``[rows, width]``; bool
        ``[rows]``."""
        raise NotImplementedError

    @property
    def words(self) -> str:
        """Its own numbers, in a few words."""
        return ""


Kind = TypeVar("Kind", bound=type[Intervention])

INTERVENTIONS: dict[str, type[Any]] = {}


def intervention(cls: Kind) -> Kind:
    """Registers an intervention under its name: plans with it can be saved and loaded."""
    if cls.name in INTERVENTIONS:
        raise ValueError(f"there is an intervention {cls.name!r} already")
    INTERVENTIONS[cls.name] = cls
    return cls


@intervention
@dataclass(frozen=True)
class Untouched(Intervention):
    """The layer computes what it computes."""

    name: ClassVar[str] = "none"
    site: ClassVar[Site] = Site.NOWHERE


@intervention
@dataclass(frozen=True, eq=False)
class NeuronAdjust(Intervention):
    """Values that look like the skill's are mirrored into the distribution of what is to stay (Neuron Adjust).

    Each neuron's pre-activation is taken for Gaussian, N(mu_f, s_f) on the texts to forget and N(mu_r, s_r) on those to
    retain. A value x that is at least as likely under the former becomes mu_r - s_r (x - mu_f) / s_f: it is carried
    over to the other Gaussian and mirrored at its mean.

    Where this deviates from the source: there such a value is changed with the probability p_f / (p_f + p_r), by a
    random draw for each forward pass; here always, so that a text does not depend on chance, nor on how a prompt is cut
    into chunks. `strength` is ours: how far towards the mirrored value x goes, 1 all the way. The authors' code takes
    variances, and the forgotten mean, for standard deviations; here they are standard deviations.

    `neurons`: int64 ``[k]``, ascending; the others: fp32 ``[k]``.
    """

    neurons: Tensor
    retain_mean: Tensor
    retain_std: Tensor
    forget_mean: Tensor
    forget_std: Tensor
    strength: float = 1.0
    name: ClassVar[str] = "neuron_adjust"
    site: ClassVar[Site] = Site.PRE_ACTIVATION

    def check(self, width: int) -> None:
        _check_neurons(self.neurons, width)
        for name in ("retain_mean", "retain_std", "forget_mean", "forget_std"):
            _check_floats(name, getattr(self, name), len(self.neurons), above_zero=name.endswith("std"))
        check_above_zero("strength", self.strength)

    def changed(self, values: Tensor) -> Tensor:
        here = values.device
        neurons, retain_mean, retain_std, forget_mean, forget_std = (
            t.to(here) for t in (self.neurons, self.retain_mean, self.retain_std, self.forget_mean, self.forget_std)
        )
        x = values.index_select(-1, neurons).float()
        as_retained, as_forgotten = (x - retain_mean) / retain_std, (x - forget_mean) / forget_std
        likelier = as_forgotten.square() / 2 + forget_std.log() <= as_retained.square() / 2 + retain_std.log()
        mirrored = retain_mean - retain_std * as_forgotten
        changed = torch.where(likelier, x + self.strength * (mirrored - x), x)
        return values.index_copy(-1, neurons, changed.to(values.dtype))

    @property
    def words(self) -> str:
        return f"{len(self.neurons)} neurons, strength {self.strength:g}"


@intervention
@dataclass(frozen=True, eq=False)
class PrunedNeurons(Intervention):
    """Neurons that say nothing any more: Selective Pruning (Pochinkov and Schoots 2024, arXiv 2403.01267), with which
    the source compares. `neurons`: int64 ``[k]``, ascending."""

    neurons: Tensor
    name: ClassVar[str] = "pruned_neurons"
    site: ClassVar[Site] = Site.ACTIVATION

    def check(self, width: int) -> None:
        _check_neurons(self.neurons, width)

    def changed(self, values: Tensor) -> Tensor:
        return values.index_fill(-1, self.neurons.to(values.device), 0.0)

    @property
    def words(self) -> str:
        return f"{len(self.neurons)} neurons"


@intervention
@dataclass(frozen=True, eq=False)
class KeySpace(Intervention):
    """Key Space Detection: nothing is said after a prompt whose key lies in the skill's hypercube.

    A key is what the down projection is given for a prompt's last token. The hypercube is mean ± alpha * std in each
    dimension, over the keys of texts of the skill. A prompt is the skill's if its key lies inside, borders included.

    Where this deviates from the source: there alpha is the least that holds all texts of the skill, times a factor set
    by hand, and keys are tested at every token that is generated, too.

    `mean`, `std`: fp32 ``[width]``; a dimension that never varied (a neuron that is always off) has std 0 and must be
    met exactly. `alpha`: above 0.
    """

    mean: Tensor
    std: Tensor
    alpha: float
    name: ClassVar[str] = "key_space"
    site: ClassVar[Site] = Site.PROMPT

    def check(self, width: int) -> None:
        _check_floats("mean", self.mean, width)
        _check_floats("std", self.std, width)
        if bool((self.std < 0).any()):
            raise PlanError("std holds a number below 0")
        check_above_zero("alpha", self.alpha)

    def abstains(self, keys: Tensor) -> Tensor:
        return self.least_alpha(keys) <= self.alpha

    def least_alpha(self, keys: Tensor) -> Tensor:
        """For each of `keys` ``[rows, width]`` the least alpha whose hypercube holds it, fp32 ``[rows]``."""
        away = (keys.float() - self.mean.to(keys.device)).abs()
        sizes = away / self.std.to(keys.device)
        return torch.where(away == 0, 0.0, sizes).amax(-1)  # 0 / 0 lies inside

    @property
    def words(self) -> str:
        return f"alpha {self.alpha:.3g}"


def _check_neurons(neurons: Tensor, width: int) -> None:
    if neurons.dtype != torch.int64 or neurons.ndim != 1 or neurons.numel() == 0:
        raise PlanError("an intervention's neurons must be a non-empty int64 array")
    if int(neurons.min()) < 0 or int(neurons.max()) >= width or not bool((neurons.diff() > 0).all()):
        raise PlanError(f"an intervention's neurons must be ascending, without repeats, and below {width}")


def _check_floats(name: str, values: Tensor, count: int, above_zero: bool = False) -> None:
    if not isinstance(values, Tensor) or values.dtype != torch.float32 or values.shape != (count,):
        raise PlanError(f"{name} is not fp32 of shape {(count,)}")
    if not bool(torch.isfinite(values).all()):
        raise PlanError(f"{name} holds something that is not a finite number")
    if above_zero and not bool((values > 0).all()):
        raise PlanError(f"{name} holds something that is not above 0")
