"""The calibration pass: its figures against a direct computation, its hooks, its memory, its text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import prompt, tiny

from coreskip import CoreskipError
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import MOST_CHARACTERS, TokenText, read_text, sample_text, tokenize
from coreskip.predictors.core_neurons import static_set
from coreskip.predictors.importance import SCORES, token_contributions
from coreskip.predictors.observe import HISTOGRAM_BINS, histogram_quantile, log_histogram, observe, taps


def activations(model: Any, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    a: list[torch.Tensor] = [torch.empty(0)] * 3
    x: list[torch.Tensor] = [torch.empty(0)] * 3
    with taps(dissect(model), a.__setitem__, x.__setitem__), torch.no_grad():
        model(ids)
    return a, x


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gpt2"])
def test_statistics_equal_a_direct_computation(family: str) -> None:
    model = tiny(family)
    ids = prompt(4, 16)
    stats = observe(model, ids.split(1), alpha=0.3, progress=False)
    a, x = activations(model, ids)
    for layer, found in enumerate(stats):
        assert found.tokens == 64
        torch.testing.assert_close(found.active, (a[layer] > 0).sum(0))
        torch.testing.assert_close(found.total, a[layer].double().sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.squares, a[layer].double().square().sum(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.input_squares, x[layer].double().square().sum(0), rtol=1e-4, atol=1e-6)
        assert found.input_norm == pytest.approx(float(x[layer].norm(dim=1).sum()), rel=1e-4)
        assert int(found.input_histogram.sum()) == x[layer].numel()
        assert int(found.activation_histogram.sum()) == a[layer].numel()
        for score in SCORES:
            expected = token_contributions(a[layer], score, 0.3, found.down_norm).sum(0).double()
            torch.testing.assert_close(found.core[score], expected, rtol=1e-3, atol=1e-2)
        kept = static_set(found, "griffin", 0.25)
        best = (a[layer] / a[layer].norm(dim=1, keepdim=True)).square().sum(0).topk(len(kept)).indices
        assert set(kept.tolist()) == set(best.tolist())


def test_hooks_come_off_even_when_the_pass_fails(llama: Any) -> None:
    def broken() -> Any:
        yield prompt(1, 4)
        raise RuntimeError("the text broke off")

    with pytest.raises(RuntimeError, match="broke off"):
        observe(llama, broken(), alpha=0.4, progress=False)
    assert not any(m._forward_pre_hooks for m in llama.modules())
    llama.train()
    observe(llama, [prompt(1, 4)], alpha=0.4, progress=False)
    assert llama.training


def test_memory_does_not_grow_with_the_text(llama: Any) -> None:
    """Ten times the text leaves behind the same tensors: sums and histograms only."""

    def size(batches: int) -> int:
        stats = observe(llama, (prompt(1, 8, seed=i) for i in range(batches)), alpha=0.4, progress=False)
        tensors = [v for s in stats for v in [*vars(s).values(), *s.core.values()] if isinstance(v, torch.Tensor)]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    assert size(2) == size(20)


def test_histogram_quantiles() -> None:
    torch.manual_seed(0)
    values = torch.randn(100_000) * 3
    histogram = log_histogram(values)
    for share in (0.1, 0.5, 0.9):
        exact = float(values.abs().quantile(share))
        assert exact * 0.99 <= histogram_quantile(histogram, share) <= exact * 1.08
    odd = log_histogram(torch.tensor([0.0, 1e30, -1e-30]))
    assert odd[0] == 2
    assert odd[HISTOGRAM_BINS - 1] == 1


# --- text


class Letters:
    """A tokenizer of characters that puts a BOS before every text."""

    bos_token_id = 1
    eos_token_id = None
    pad_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [5 + ord(c) % 100 for c in text])


def test_windows_are_spread_over_the_text_and_start_with_bos() -> None:
    text = tokenize(Letters(), "abcdefghij" * 10)
    assert text.prefix.tolist() == [1]
    windows = text.windows(11, 4)
    assert windows.shape == (4, 11)
    assert (windows[:, 0] == 1).all()
    assert windows[:, 1:].flatten().tolist() == [
        i for s in (0, 2, 5, 7) for i in text.ids[s * 10 : s * 10 + 10].tolist()
    ]
    first, second = text.split(0.5, 0.5)
    assert torch.equal(torch.cat([first.ids, second.ids]), text.ids)
    with pytest.raises(CoreskipError, match="at least 199 are needed"):
        text.windows(200, 1)


def test_empty_and_unreadable_texts(tmp_path: Path) -> None:
    with pytest.raises(CoreskipError, match="empty"):
        tokenize(Letters(), " \n ")
    with pytest.raises(CoreskipError, match="cannot read"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(CoreskipError, match="not UTF-8"):
        read_text(tmp_path / "binary")
    with pytest.raises(CoreskipError, match="cannot read"):
        read_text(tmp_path)


def test_a_huge_file_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    line = "é" * 49 + "\n"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(2 * MOST_CHARACTERS // 99):
            file.write(line)
    text = read_text(path)
    assert 0.9 * MOST_CHARACTERS / 2 < len(text) <= MOST_CHARACTERS
    assert set(text) == {"é", "\n"}


def test_sampled_text_is_seeded_and_leaves_the_random_state_alone(llama: Any) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    one = sample_text(llama, Letters(), tokens=40, length=20, seed=3, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    two = sample_text(llama, Letters(), tokens=40, length=20, seed=3, progress=False)
    other = sample_text(llama, Letters(), tokens=40, length=20, seed=4, progress=False)
    assert len(one.ids) == 40
    assert torch.equal(one.ids, two.ids)
    assert not torch.equal(one.ids, other.ids)
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()
    assert isinstance(one, TokenText)
