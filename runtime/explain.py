"""What a plan, a set or scores say of a model, in the model's own words: the tokens that its neurons promote."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..predictors.errors import CoreskipError
from ..predictors.interventions import Site
from ..predictors.lm_head import LMHead, Side, standardised
from ..predictors.plan import Plan
from ..predictors.policies import Chooser
from ..predictors.scores import NeuronScores, NeuronSet

_SHOWN = 6  # tokens shown per layer
_BAR = 20


@dataclass(frozen=True)
class LayerWords:
    """One layer of an explained set.

    Attributes:
        layer: its number. kept: neurons kept of `width`; None where that is decided while it runs.
        lost: tokens that the neurons left out stand for most clearly, clearest first.
        held: the same of the neurons that stay.
    """

    layer: int
    width: int
    kept: int | None
    why: str
    lost: tuple[str, ...]
    held: tuple[str, ...]


def explain(plan: Plan, model: Any, tokenizer: Any, *, progress: bool = True) -> list[LayerWords]:
    """Per layer what a plan keeps and drops, with the tokens that these neurons promote, see `LMHead.promoted`: of each
    neuron the token whose logit it raises most, the neurons with the clearest ones first.

    Of layers whose neurons are chosen while they run only the share is known, of skipped ones that nothing is kept.
    Multiplies the fixed layers' neurons with the LM head: some seconds for a small model, minutes for a large one.

    Raises:
        CoreskipError: another model's plan.
    """
    plan.check(model)
    head = LMHead.of(model)
    layers = tqdm(list(enumerate(plan.layers)), desc="reading through the LM head", disable=not progress, leave=False)
    return [_layer(index, layer, head, tokenizer) for index, layer in layers]


def _layer(index: int, layer: Any, head: LMHead, tokenizer: Any) -> LayerWords:
    mlp, policy = head.anatomy.feed_forwards[index], layer.neurons
    width = 0 if mlp is None else mlp.intermediate_size
    if width == 0:
        return LayerWords(index, 0, None, _experts(head.anatomy.experts[index], layer), (), ())
    if layer.intervention.site is not Site.NOWHERE:
        return LayerWords(index, width, None, f"{layer.intervention.name}: {layer.intervention.words}", (), ())
    if policy.chooser not in (Chooser.NOTHING, Chooser.CALIBRATION):
        why = f"{layer.kept(width) / width:.0%}, chosen at run time by {policy.chooser.value} ({policy.name})"
        return LayerWords(index, width, None, why, (), ())
    kept = torch.full((width,), bool(layer.layer.mlp))
    if policy.chooser is Chooser.CALIBRATION and layer.layer.mlp:
        kept = torch.zeros(width, dtype=torch.bool).index_fill_(0, policy.indices.cpu(), True)
    tokens = [] if bool(kept.all()) else _clearest(index, head)
    lost, held = (_words(tokenizer, (token for neuron, token in tokens if bool(kept[neuron]) == own)) for own in (0, 1))
    why = policy.name if layer.layer.mlp else layer.layer.name
    return LayerWords(index, width, int(kept.sum()), why, lost, held)


def _experts(experts: Any, layer: Any) -> str:
    """What a layer without an MLP of its own keeps."""
    if experts is None:
        return "no MLP"
    kept = getattr(layer.experts, "indices", None)
    names = "" if kept is None else ": " + ", ".join(map(str, kept.tolist()))
    words = f", {layer.experts.words}" if layer.experts.words else ""
    return f"{layer.experts.kept(experts.count)} of {experts.count} experts ({layer.experts.name}){words}{names}"


def _clearest(layer: int, head: LMHead) -> list[tuple[int, int]]:
    """All neurons of a layer with the token that each promotes most, the clearest first."""
    width = head.anatomy.mlp(layer).intermediate_size
    best = [standardised(head.logits(layer, some)).max(1) for some in torch.arange(width).split(256)]
    clearness = torch.cat([each.values for each in best])
    order = clearness.argsort(descending=True, stable=True)
    return list(zip(order.tolist(), torch.cat([each.indices for each in best])[order].tolist(), strict=True))


def _words(tokenizer: Any, ids: Iterable[int]) -> tuple[str, ...]:
    """The first tokens of these as text, each once."""
    words: dict[str, None] = {}
    for token in ids:
        words.setdefault(shown(tokenizer, token))
        if len(words) == _SHOWN:
            break
    return tuple(words)


def shown(tokenizer: Any, token: int) -> str:
    """A token as people read it: quoted where white space or control characters would be lost."""
    text = tokenizer.decode([token])
    return text if text.isprintable() and text == text.strip() and text else repr(text)


def table(layers: Sequence[LayerWords]) -> str:
    """One line per layer."""
    lines = [f"layer  {'kept':>13} {'':{_BAR}}  tokens that the neurons left out promote | those kept"]
    for each in layers:
        if each.kept is None:
            lines.append(f"{each.layer:5}  {'':13} {'':{_BAR}}  {each.why}")
            continue
        share = each.kept / each.width if each.width else 0.0
        bar = f"{'█' * round(_BAR * share):·<{_BAR}}"
        words = f"{', '.join(each.lost)} | {', '.join(each.held)}" if each.lost or each.held else each.why
        lines.append(f"{each.layer:5}  {each.kept:5} / {each.width:<5} {bar}  {words}")
    return "\n".join(lines)


def overlaps(mine: NeuronSet, others: Mapping[str, NeuronSet]) -> str:
    """How much of what others keep is kept here, too, beside what two sets of these sizes share by chance."""
    lines = ["", "overlap of the neurons kept (in both, of those in either)   here   by chance"]
    for name, other in others.items():
        p, q = mine.share, other.share
        chance = p * q / (p + q - p * q) if p + q else 0.0
        lines.append(f"  {name:56} {mine.overlap(other):6.1%}  {chance:6.1%}")
    return "\n".join(lines)


def neuron(layer: int, index: int, model: Any, tokenizer: Any, scores: NeuronScores | None = None) -> str:
    """One neuron: its score and rank where there are scores, the tokens that it promotes, and those that drive it."""
    head = LMHead.of(model)
    head.check(layer, index)
    lines = [f"neuron {index} of layer {layer}"]
    if scores is not None:
        mine = scores.layers[layer]
        place, name = int((mine > mine[index]).sum()) + 1, str(scores.recipe.get("method", "score"))
        lines.append(f"  {name:10} {float(mine[index]):.6g}, place {place} of {len(mine)} in its layer")
    sides: tuple[tuple[Side, str], ...] = (("writes", "promotes"), ("reads", "answers to"))
    for side, what in sides:
        found = head.promoted(layer, index, 8, side)
        lines.append(f"  {what:10} " + ", ".join(f"{shown(tokenizer, token)} ({z:.1f})" for token, z in found))
    return "\n".join([*lines, "  (in brackets: standard deviations of its logits over the vocabulary)"])


def scores_table(scores: NeuronScores, count: int, tokenizer: Any, model: Any) -> str:
    """The neurons with the highest scores of all, with the tokens that they promote; of other units their numbers."""
    flat = torch.cat(scores.layers)
    starts = torch.tensor([0, *(len(layer) for layer in scores.layers)]).cumsum(0)
    head = LMHead.of(model) if scores.unit == "neurons" else None
    lines = [repr(scores), f"layer  {scores.unit[:-1]:>8}       score" + ("  promotes" if head else "")]
    for place in flat.argsort(descending=True, stable=True)[:count].tolist():
        layer = int(torch.searchsorted(starts, place, right=True)) - 1
        unit = place - int(starts[layer])
        words = "" if head is None else ", ".join(shown(tokenizer, t) for t, _ in head.promoted(layer, unit, 5))
        lines.append(f"{layer:5}  {unit:8}  {float(flat[place]):10.5g}  {words}".rstrip())
    return "\n".join(lines)


def check_picture(path: Path) -> None:
    """Raise `CoreskipError` where no picture can be drawn: matplotlib is not installed, or the file has another
    ending."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CoreskipError("a picture needs matplotlib: pip install 'coreskip[plots]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise CoreskipError(f"a picture's name ends in .png, .svg or .pdf, not {path.name!r}")


def picture(sets: Mapping[str, NeuronSet], path: Path) -> None:
    """The share of neurons that each of the sets keeps of every layer, as a heat map: png, svg or pdf by its name."""
    from matplotlib.figure import Figure

    shares = [list(each.shares) for each in sets.values()]
    figure = Figure(figsize=(max(6.0, 0.25 * len(shares[0])), 1.2 + 0.4 * len(shares)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.set_yticks(range(len(shares)), list(sets))
    axes.set_xlabel("layer")
    figure.colorbar(image, label="share of neurons kept")
    figure.savefig(path)
