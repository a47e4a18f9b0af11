"""`explain`: plans, sets and scores in the words of the model; in Python and on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_cli import folder as folder
from test_cli import run
from test_cli import story as story
from tiny_models import plan_of, tiny

import coreskip
from coreskip import CoreskipError, NeuronScores, NeuronSet, Plan
from coreskip.predictors.expert_policies import KeptExperts
from coreskip.predictors.fingerprint import Fingerprint
from coreskip.predictors.interventions import PrunedNeurons
from coreskip.predictors.lm_head import LMHead
from coreskip.predictors.plan import LayerPlan
from coreskip.predictors.policies import SkipMLP
from coreskip.runtime.explain import explain, neuron, overlaps, scores_table, shown, table


class Letters:
    """Every token is a letter of its own number."""

    def decode(self, ids: list[int]) -> str:
        return f"t{ids[0]}"


def made(model: Any) -> tuple[NeuronSet, Plan]:
    generator = torch.Generator().manual_seed(4)
    layers = tuple(torch.randn(160, generator=generator) for _ in range(3))
    chosen = NeuronScores(layers, Fingerprint.of(model), recipe={"method": "drawn"}).top(0.5)
    return chosen, chosen.plan(model)


def test_layers_name_what_their_neurons_promote(llama: Any) -> None:
    chosen, plan = made(llama)
    found = explain(plan, llama, Letters(), progress=False)
    head = LMHead.of(llama)
    for layer, words in enumerate(found):
        assert (words.layer, words.width, words.kept) == (layer, 160, 80)
        clearest = []
        for index in range(160):
            token, clearness = head.promoted(layer, index, 1)[0]
            clearest.append((clearness, f"t{token}", bool(chosen.layers[layer][index])))
        for own, shown_words in ((False, words.lost), (True, words.held)):
            expected = dict.fromkeys(word for _, word, kept in sorted(clearest, reverse=True) if kept == own)
            assert shown_words == tuple(expected)[:6]
    assert "80 / 160" in table(found)


def test_layers_that_choose_or_skip_are_said_to(llama: Any) -> None:
    by_prompt = explain(plan_of(llama, "griffin"), llama, Letters(), progress=False)
    assert by_prompt[0].kept is None
    assert "50%, chosen at run time by prompt (core_neurons)" in table(by_prompt)
    dense = Plan.dense(llama)
    skipped = Plan((LayerPlan(layer=SkipMLP()), *dense.layers[1:]), dense.model)
    found = explain(skipped, llama, Letters(), progress=False)
    assert (found[0].kept, found[0].why, found[0].held) == (0, "skip_mlp", ())
    assert (found[1].kept, found[1].lost) == (160, ())
    with pytest.raises(CoreskipError, match="other weights"):
        explain(dense, tiny("llama", seed=1), Letters(), progress=False)


def test_experts_and_interventions_are_named(llama: Any) -> None:
    model = tiny("olmoe")
    dense = Plan.dense(model)
    kept = tuple(replace(layer, experts=KeptExperts(torch.tensor([1, 4, 6]))) for layer in dense.layers)
    found = explain(replace(dense, layers=kept), model, Letters(), progress=False)
    assert found[0].why == "3 of 8 experts (experts): 1, 4, 6"
    dense = Plan.dense(llama)
    layers = (replace(dense.layers[0], intervention=PrunedNeurons(torch.arange(3))), *dense.layers[1:])
    found = explain(replace(dense, layers=layers), llama, Letters(), progress=False)
    assert (found[0].kept, found[0].why) == (None, "pruned_neurons: 3 neurons")


def test_overlaps_stand_beside_chance(llama: Any) -> None:
    chosen, _ = made(llama)
    other = NeuronSet.random(llama, 0.25, seed=3)
    lines = overlaps(chosen, {"itself": chosen, "random": other}).splitlines()
    assert lines[-2].split() == ["itself", "100.0%", "33.3%"]
    assert lines[-1].split() == ["random", f"{chosen.overlap(other):.1%}", "20.0%"]


def test_single_neurons(llama: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    layers = tuple(torch.randn(160, generator=generator) for _ in range(3))
    scores = NeuronScores(layers, Fingerprint.of(llama), recipe={"method": "drawn"})
    place = int((layers[1] > layers[1][7]).sum()) + 1
    text = neuron(1, 7, llama, Letters(), scores)
    assert f"place {place} of 160" in text
    token, clearness = LMHead.of(llama).promoted(1, 7, 1)[0]
    assert f"promotes   t{token} ({clearness:.1f})" in text
    best = int(torch.cat(layers).argmax())
    assert scores_table(scores, 1, Letters(), llama).splitlines()[-1].split()[:2] == [str(best // 160), str(best % 160)]
    for layer, index in ((3, 0), (0, 160)):
        with pytest.raises(CoreskipError, match=r"there is no layer 3|has no neuron 160"):
            neuron(layer, index, llama, Letters())


def test_white_space_is_quoted() -> None:
    class Spaces:
        def decode(self, ids: list[int]) -> str:
            return [" the", "\n", "the", ""][ids[0]]

    assert [shown(Spaces(), token) for token in range(4)] == ["' the'", "'\\n'", "the", "''"]


def test_the_command(capsys: pytest.CaptureFixture[str], folder: Path, story: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    scores = coreskip.scores(model, tokenizer, story, method="griffin", progress=False)
    scores.save(tmp_path / "my.scores")
    scores.top(0.5).save(tmp_path / "my.set")
    scores.top(0.25).plan(model).save(tmp_path / "my.plan")
    places = {name: str(tmp_path / f"my.{name}") for name in ("scores", "set", "plan")}
    picture = tmp_path / "kept.svg"
    code, out, _ = run(
        capsys, "explain", places["plan"], str(folder), "--with", places["set"], "--picture", str(picture)
    )
    assert (code, "40 / 160" in out, "overlap" in out) == (0, True, True)
    assert out.splitlines()[-1].split()[-2:] == ["50.0%", "20.0%"]  # half of the set, all of the plan
    assert picture.read_text().startswith("<?xml")
    code, out, _ = run(capsys, "explain", places["set"], str(folder), "--json")
    assert [layer["kept"] for layer in json.loads(out)["layers"]] == [80, 80, 80]
    code, out, _ = run(capsys, "explain", places["scores"], str(folder), "--top", "3")
    assert (code, len(out.splitlines())) == (0, 5)
    code, out, _ = run(capsys, "explain", places["scores"], str(folder), "--neuron", "2:9")
    assert (code, "neuron 9 of layer 2" in out, "griffin" in out) == (0, True, True)
    for words, line in (
        ((str(tmp_path / "none"),), "there is no plan at"),
        ((places["plan"], "--neuron", "one"), "write LAYER:INDEX"),
        ((places["scores"], "--with", places["set"]), "make a set of these scores first"),
        ((places["set"], "--with", places["scores"]), "make a set of them"),
        ((places["plan"], "--picture", str(tmp_path / "none" / "x.svg")), "none"),
    ):
        code, out, err = run(capsys, "explain", words[0], str(folder), *words[1:])
        assert (code, out, line in err, err.count("\n")) == (2, "", True, 1), err
    code, _, err = run(capsys, "explain", places["plan"], str(folder), "--picture", str(tmp_path / "x.txt"))
    assert (code, "ends in .png, .svg or .pdf" in err) == (2, True)
    code, _, err = run(capsys, "show", places["scores"])
    assert (code, "coreskip explain" in err) == (2, True)
