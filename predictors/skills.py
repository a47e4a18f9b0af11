"""What two kinds of texts do to the neurons of a model: where a skill that is to be switched off shows itself.

The texts to forget show the skill, those to retain show what is to stay. Of both, one pass over the dense model gives
what the interventions of `interventions` are made of.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .anatomy import Anatomy
from .calibration import TokenText, most_positions, text_of
from .checks import kind_of
from .errors import CoreskipError
from .interventions import KeySpace, NeuronAdjust, PrunedNeurons
from .observe import inference, taps

PIECE = 512  # tokens that are observed together
_LEAST_TOKENS = 256  # of either kind: fewer say nothing about a standard deviation
_LEAST_PROMPTS = 16
_LEAST_STD = 1e-6  # of a pre-activation; a neuron that never varies would otherwise be infinitely unlikely elsewhere


#: texts of one kind, as they may be given
SomeTexts = Sequence[str | os.PathLike[str] | TokenText] | str | os.PathLike[str] | TokenText


# --- texts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts of one kind, each as the model is given it: int64 ids ``[tokens]``, with what the tokenizer begins with.

    name: what they are called in messages.
    """

    name: str
    ids: tuple[Tensor, ...]

    @classmethod
    def of(cls, name: str, texts: Any, tokenizer: Any) -> Texts:
        """
        Args:
            texts: a list of texts, `Path`s of UTF-8 files or `TokenText`s, or one of these.

        Raises:
            CoreskipError: none of these, no text, or an empty one.
        """
        given = list(texts) if isinstance(texts, (list, tuple)) else [texts]
        if texts is None or not given:
            raise CoreskipError(f"{name} is {kind_of(texts) if texts is None else 'empty'}: give a list of texts")
        try:
            found = [text_of(tokenizer, text) for text in given]
        except CoreskipError as error:
            raise CoreskipError(f"{name}: {error}") from None
        return cls(name, tuple(torch.cat([text.prefix, text.ids]) for text in found))

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.ids)

    def pieces(self, length: int, most: int) -> list[Tensor]:
        """The texts in pieces ``[1, up to length]``, evenly thinned out where they have more than `most` tokens."""
        every = [piece[None] for ids in self.ids for piece in ids.split(length) if len(piece) > 1]
        count = max(1, round(len(every) * min(1.0, most / max(1, self.tokens))))
        return [every[i * len(every) // count] for i in range(count)] if every else []

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256(b"".join(ids.to(torch.int32).numpy().tobytes() + b"|" for ids in self.ids))
        return {"texts": len(self.ids), "tokens": self.tokens, "sha256": digest.hexdigest()}


def check_contrast(one: Texts, other: Texts) -> None:
    """Raises CoreskipError where both kinds are the same."""
    if {tuple(ids.tolist()) for ids in one.ids} == {tuple(ids.tolist()) for ids in other.ids}:
        raise CoreskipError(f"{one.name} and {other.name} are the same texts: nothing tells one kind from the other")


def check_lengths(*kinds: Texts) -> None:
    """Raises CoreskipError where the texts of a kind say too little about how its neurons vary."""
    for texts in kinds:
        if texts.tokens < _LEAST_TOKENS:
            raise CoreskipError(
                f"the texts of {texts.name} have {texts.tokens} tokens, at least {_LEAST_TOKENS} are needed: give more"
            )


def check_prompts(*kinds: Texts) -> None:
    """Raises CoreskipError where there are too few texts for a cube around their last tokens."""
    for texts in kinds:
        if len(texts.ids) < _LEAST_PROMPTS:
            raise CoreskipError(
                f"{texts.name} has {len(texts.ids)} texts, each of which gives one key: at least {_LEAST_PROMPTS} "
                "are needed"
            )


def checked_layers(layers: Any, depth: int) -> list[int]:
    """Numbers of layers, ascending, each once.

    Raises:
        CoreskipError: something else, or none of a model that is so many layers deep.
    """
    given = list(layers) if isinstance(layers, (list, tuple, range, set, frozenset)) else None
    if not given or not all(type(index) is int for index in given):
        raise CoreskipError(f"layers is {layers!r}: give a list of their numbers, from 0 to {depth - 1}")
    wrong = [index for index in given if not 0 <= index < depth]
    if wrong:
        raise CoreskipError(f"there is no layer {wrong[0]}: the model has {depth}, from 0 to {depth - 1}")
    return sorted(set(given))


# --- what neurons do --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NeuronStats:
    """What the neurons of each layer do on texts of one kind; by layer, fp32 ``[width]``, empty where it has no MLP.

    mean, std: of the pre-activation, over tokens. magnitude: mean absolute value of the activation.
    """

    mean: tuple[Tensor, ...]
    std: tuple[Tensor, ...]
    magnitude: tuple[Tensor, ...]


class _Sums:
    """Running sums of one layer, float64 ``[width]``."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total, self.squares, self.absolute = torch.zeros(3, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def see_pre_activations(self, x: Tensor) -> None:
        x = x.double()
        self.total += x.sum(0)
        self.squares += x.square().sum(0)
        self.tokens += len(x)

    def see_activations(self, a: Tensor) -> None:
        self.absolute += a.double().abs().sum(0)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        mean = self.total / self.tokens
        std = (self.squares / self.tokens - mean.square()).clamp(min=_LEAST_STD**2).sqrt()
        return mean.float().cpu(), std.float().cpu(), (self.absolute / self.tokens).float().cpu()


def neuron_stats(model: Any, anatomy: Anatomy, texts: Texts, tokens: int, progress: bool = True) -> NeuronStats:
    """What neurons do on up to `tokens` tokens of `texts`.

    Raises:
        CoreskipError: the model's activations on these texts are not finite.
    """
    device = next(model.parameters()).device
    sums = {index: _Sums(mlp.intermediate_size, device) for index, mlp in anatomy.present}
    with (
        taps(anatomy, lambda index, a: sums[index].see_activations(a)),
        _pre_activations(anatomy, sums),
    ):
        run_texts(model, anatomy, texts.pieces(observed_length(model), tokens), f"observing {texts.name}", progress)
    nothing = torch.empty(0, dtype=torch.float32, device="cpu")
    found = [sums[i].result() if i in sums else (nothing, nothing, nothing) for i in range(len(anatomy))]
    if not all(bool(torch.isfinite(value).all()) for layer in found for value in layer):
        raise CoreskipError(f"the model's activations on {texts.name} are not finite numbers: check its weights")
    return NeuronStats(*zip(*found, strict=True))


@contextmanager
def _pre_activations(anatomy: Anatomy, sums: dict[int, _Sums]) -> Iterator[None]:
    handles = []

    def hook(index: int, width: int) -> Any:
        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            sums[index].see_pre_activations(output.detach().reshape(-1, output.shape[-1])[:, :width])

        return after

    try:
        for index, mlp in anatomy.present:
            handles.append(mlp.pre_activation.register_forward_hook(hook(index, mlp.intermediate_size)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def observed_length(model: Any) -> int:
    """Tokens of a text that are observed together: as many as the model has positions for, at most 512."""
    return min(PIECE, most_positions(model, PIECE))


def run_texts(model: Any, anatomy: Anatomy, pieces: Sequence[Tensor], what: str, progress: bool) -> None:
    """Dense passes over token ids ``[1, length]``, one after the other, for those who watch."""
    device = next(model.parameters()).device
    with inference(model), tqdm(pieces, desc=what, unit="text", disable=not progress, leave=False) as bar:
        for ids in bar:
            anatomy.stack(input_ids=ids.to(device), use_cache=False)


def last_keys(model: Any, anatomy: Anatomy, texts: Texts, progress: bool = True) -> dict[int, Tensor]:
    """By layer, what the down projection is given for each text's last token, fp32 ``[texts, width]``. Of a longer text
    the first tokens count, as many as the model has positions for and at most 512."""
    length = observed_length(model)
    found: dict[int, list[Tensor]] = {index: [] for index, _ in anatomy.present}
    with taps(anatomy, lambda index, a: found[index].append(a[-1].float().cpu())):
        run_texts(model, anatomy, [ids[None, :length] for ids in texts.ids], f"observing {texts.name}", progress)
    return {index: torch.stack(keys) for index, keys in found.items()}


# --- interventions made of it -----------------------------------------------------------------------------------------


def contrast(forget: NeuronStats, retain: NeuronStats, ranking: str) -> list[Tensor]:
    """How much more a neuron is the skill's, by layer ``[width]``.

    ranking: "difference": of the mean pre-activations, forget minus retain, as the source of Neuron Adjust ranks them;
    "standardised": the same in standard deviations (their root mean square), so that no layer is ahead for its scale;
    "distance": its absolute value: neurons that the skill leaves still count, too;
    "magnitude": mean |activation| on forget over that on retain (Selective Pruning, arXiv 2403.01267).
    """
    if ranking == "magnitude":
        return [f / (r + 1e-8) for f, r in zip(forget.magnitude, retain.magnitude, strict=True)]
    found = [f - r for f, r in zip(forget.mean, retain.mean, strict=True)]
    if ranking == "difference":
        return found
    stds = zip(forget.std, retain.std, strict=True)
    found = [d / ((f.square() + r.square()) / 2).sqrt() for d, (f, r) in zip(found, stds, strict=True)]
    return found if ranking == "standardised" else [each.abs() for each in found]


def highest(scores: Sequence[Tensor], share: float, layers: Sequence[int]) -> dict[int, Tensor]:
    """The share of all neurons of these layers with the highest scores, by layer, int64 ascending; at least one
    neuron. Layers of which there is none are left out."""
    sizes = [len(scores[i]) for i in layers]
    every = torch.cat([scores[i] for i in layers])
    best = every.argsort(descending=True, stable=True)[: max(1, round(share * len(every)))]
    chosen = torch.zeros(len(every), dtype=torch.bool, device="cpu")
    chosen[best] = True
    found = {i: part.nonzero()[:, 0] for i, part in zip(layers, chosen.split(sizes), strict=True)}
    return {index: neurons for index, neurons in found.items() if len(neurons)}


def neuron_adjust(
    forget: NeuronStats, retain: NeuronStats, neurons: Mapping[int, Tensor], strength: float
) -> dict[int, NeuronAdjust]:
    """Neuron Adjust of these neurons, by layer."""
    return {
        i: NeuronAdjust(at, retain.mean[i][at], retain.std[i][at], forget.mean[i][at], forget.std[i][at], strength)
        for i, at in neurons.items()
    }


def pruned(neurons: Mapping[int, Tensor]) -> dict[int, PrunedNeurons]:
    return {index: PrunedNeurons(at) for index, at in neurons.items()}


@dataclass(frozen=True)
class Separation:
    """How well a hypercube tells texts it has not seen: shares of those to forget, and of those to retain, that it
    holds."""

    true_positives: float
    false_positives: float

    @property
    def gain(self) -> float:
        return self.true_positives - self.false_positives


def key_space(keys: Tensor, held_out: Tensor, retain: Tensor) -> tuple[KeySpace, Separation]:
    """The hypercube around `keys` with the alpha that tells `held_out` keys of the same kind from those to `retain`
    best, by true less false positives; each ``[texts, width]``. Of the alphas that do, the middle one."""
    cube = KeySpace(keys.mean(0), keys.std(0), 1.0)
    inside, outside = cube.least_alpha(held_out), cube.least_alpha(retain)
    edges = torch.cat([inside, outside]).unique()
    edges = edges[torch.isfinite(edges)]
    alphas = torch.cat([(edges[:-1] + edges[1:]) / 2, edges[-1:] * 1.01]).clamp(min=1e-6)
    alphas = alphas if len(alphas) else torch.ones(1)  # of keys that lie in no hypercube
    gains = (inside[:, None] <= alphas).double().mean(0) - (outside[:, None] <= alphas).double().mean(0)
    best = (gains >= gains.max() - 1e-12).nonzero()[:, 0]
    alpha = float(alphas[best[len(best) // 2]])
    shares = [float((sizes <= alpha).double().mean()) for sizes in (inside, outside)]
    return KeySpace(cube.mean, cube.std, alpha), Separation(*shares)


def best_key_space(
    forget: dict[int, Tensor], retain: dict[int, Tensor], layers: Sequence[int]
) -> tuple[int, KeySpace, Separation]:
    """The layer whose hypercube tells the two kinds apart best, by texts that it was not made of: every third one of
    those to forget. Among equals the last one: the source takes a model's last layer."""
    best, found = -2.0, list[tuple[int, KeySpace, Separation]]()
    for index in layers:
        keys = forget[index]
        held_out = torch.arange(len(keys), device="cpu") % 3 == 2
        cube, separation = key_space(keys[~held_out], keys[held_out], retain[index])
        if separation.gain >= best:
            best, found = separation.gain, [(index, cube, separation)]
    return found[0]
