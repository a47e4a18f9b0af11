"""The census of model types: rows that are right, and rows of what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from coreskip.bench import census, modes
from coreskip.bench.provenance import provenance
from coreskip.bench.tables import MODES, fill_tables
from coreskip.bench.train_moe import batches, tiny_moe, train, widened
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.feed_forward import FeedForward

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {"native": True, "neurons": "right", "core": "right", "top_expert": "no experts", "mlps": 4}),
        ("mixtral", {"neurons": "no MLP", "top_expert": "right", "experts": 4, "routers": 4}),
        ("nemotron_h", {"neurons": "right", "native": False, "halves": [3, 4], "mlps": 2, "experts": 1, "layers": 4}),
        ("jetmoe", {"refused": "form that coreskip does not read"}),
    ],
)
def test_types_are_compared_with_themselves(model_type: str, expected: dict[str, object]) -> None:
    row = census.examine(model_type)
    assert row["built"]
    assert row["error"] is None
    if "refused" not in expected:
        assert (row["dense"], row["unwrap"], row["refused"]) == ("right", True, None)
    for name, value in expected.items():
        assert row[name] == value if name != "refused" else str(value) in row[name]


def test_what_is_wrong_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps that leave out other neurons than the twin's."""
    right = FeedForward.matrices
    monkeypatch.setattr(census, "dissect", lambda model: dissect(model))

    def shifted(self: FeedForward) -> object:
        found = right(self)
        return type(found)(found.gate, found.up.roll(1, 0), *list(vars(found).values())[2:])

    model = census.build("llama")
    monkeypatch.setattr(FeedForward, "matrices", shifted)
    monkeypatch.setattr("coreskip.predictors.anatomy.proved", lambda mlp, empty: True)
    assert census._neurons(model, {"mlps": 4}, []).startswith("wrong by")


def test_a_census_goes_on_where_it_was(tmp_path: Path) -> None:
    rows = tmp_path / "census.jsonl"
    for types in ("llama", "xmod"):
        result = CliRunner().invoke(census.main, ["-o", str(rows), "--types", types], catch_exceptions=False)
        assert result.exit_code == 0
    found = {row["type"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert list(found) == ["llama", "xmod"]
    assert found["llama"]["dense"] == "right"
    assert not found["xmod"]["built"]
    assert "2 types; dense: 1 built, 1 right, 1 native, 0 in part" in result.output
    table = fill_tables("<!-- table: census -->\n<!-- end table -->", tmp_path)
    assert "| llama | yes | 4, 0 of 4 | right | right | no experts | exact | native |" in table


@pytest.mark.parametrize("model_type", ["lfm3", "mixtral"])
def test_every_way_of_generating_gives_the_same(model_type: str, tmp_path: Path) -> None:
    row = modes.examine(model_type)
    assert {name: row[name] for name in MODES} == dict.fromkeys(MODES, "same")
    (tmp_path / "modes.jsonl").write_text(
        json.dumps({"kind": "modes", "model": "tiny", **row, **provenance("none"), "static cache": ""}) + "\n"
    )
    table = fill_tables("<!-- table: modes -->\n<!-- end table -->", tmp_path)
    assert f"| {model_type} | one native call | same | same | same | same | - | same |" in table


@pytest.mark.parametrize("model_type", ["llama4_text", "modernbert-decoder", "gemma4_text", "gemma3n_text"])
def test_four_bits_are_the_same_numbers_natively(model_type: str) -> None:
    """Of what stands beside the layers, and of experts that are given every token, too."""
    assert modes._in_four_bits(census.build(model_type)) == "same"


def test_another_text_in_some_mode_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert modes._compared(tokens, tokens) == "same"
    assert modes._compared(torch.tensor([[1, 2, 3, 5]]), tokens) == "other from token 3 on"
    assert "shape" in modes._compared(tokens[:, :2], tokens)
    monkeypatch.setattr(modes, "wrap", lambda *given, **options: (_ for _ in ()).throw(RuntimeError("no")))
    row = modes.examine("llama")
    assert {row[name] for name in MODES} == {"error: RuntimeError: no"}


def test_training_lowers_the_loss_and_routes() -> None:
    text = TokenText(
        torch.randint(3, 40, (600,), generator=torch.Generator().manual_seed(0)), torch.tensor([]), "random"
    )
    model = tiny_moe()
    losses = train(model, text, steps=6, rows=2, length=32, rate=3e-3, seed=0)
    assert losses[-1] < losses[0]
    assert [experts.count for experts in dissect(model).experts if experts] == [16] * 4
    assert [ids.tolist() for ids in batches(text, 2, 2, 8, 1)] == [ids.tolist() for ids in batches(text, 2, 2, 8, 1)]


def test_a_widened_mixture_is_the_same_function() -> None:
    model = tiny_moe(experts=4, neurons=24, hidden=32).eval()
    wide, ids = widened(model, 4), torch.arange(5, 25)[None]
    assert wide.model.layers[0].mlp.experts.down_proj.shape == (4, 32, 96)
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
