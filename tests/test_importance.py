"""Scores and selections against slow, direct definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreskip import CoreskipError
from coreskip.predictors.checks import check_share
from coreskip.predictors.core_neurons import (
    SentenceCounter,
    cluster_sentences,
    core_membership,
    kmeans_elbow,
    nearest_cluster,
)
from coreskip.predictors.importance import kept_count, most_important, token_contributions


def slow_core(a: torch.Tensor, score: str, alpha: float, norm: torch.Tensor) -> torch.Tensor:
    """The definitions, a token and a neuron at a time."""
    out = torch.zeros_like(a)
    for t, token in enumerate(a.tolist()):
        if score == "griffin":
            size = math.sqrt(sum(v * v for v in token))
            out[t] = torch.tensor([(v / size) ** 2 if size else 0.0 for v in token])
            continue
        weight = [1.0] * len(token) if score != "magnitude_down" else norm.tolist()
        ranked = {
            "signed": list(token),
            "magnitude": [abs(v) for v in token],
            "magnitude_down": [abs(v) * w for v, w in zip(token, weight, strict=True)],
        }[score]
        pool = [i for i, v in enumerate(token) if v > 0] if score == "signed" else list(range(len(token)))
        pool.sort(key=lambda i: -ranked[i])
        for i in pool[: math.ceil(alpha * len(pool))]:
            out[t, i] = 1.0
    return out


@pytest.mark.parametrize("score", ["signed", "magnitude", "magnitude_down", "griffin"])
@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.4, 1.0])
def test_token_contributions(score: str, alpha: float) -> None:
    torch.manual_seed(0)
    a, norm = torch.randn(17, 33), torch.rand(33) + 0.1
    a[3] = 0.0
    a[4] = -a[4].abs()  # no positive activation: an empty signed core
    got = token_contributions(a, score, alpha, norm)  # type: ignore[arg-type]
    expected = slow_core(a, score, alpha, norm)
    if score in ("magnitude", "magnitude_down"):
        got[3], expected[3] = 0.0, 0.0  # all tied: any choice is right
    torch.testing.assert_close(got, expected)
    if score == "signed":
        assert got[4].sum() == 0
        assert (got[a <= 0] == 0).all()


def test_contributions_add_over_chunks() -> None:
    a, norm = torch.randn(20, 16), torch.ones(16)
    whole = token_contributions(a, "signed", 0.4, norm).sum(0)
    parts = sum(token_contributions(part, "signed", 0.4, norm).sum(0) for part in a.split(7))
    torch.testing.assert_close(whole, parts)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=24), st.data())
def test_most_important_breaks_ties_as_documented(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(pairs)))
    score, tie = (torch.tensor([float(p[i]) for p in pairs]) for i in (0, 1))
    expected = sorted(sorted(range(len(pairs)), key=lambda i: (-pairs[i][0], -pairs[i][1], i))[:count])
    assert most_important(score, tie, count).tolist() == expected


@pytest.mark.parametrize(("width", "keep", "expected"), [(10, 0.5, 5), (10, 0.01, 1), (10, 1.0, 10), (1536, 0.7, 1075)])
def test_kept_count(width: int, keep: float, expected: int) -> None:
    assert kept_count(width, keep) == expected


@pytest.mark.parametrize("value", [0, -0.1, 1.01, math.nan, math.inf])
def test_shares_outside_zero_to_one(value: float) -> None:
    with pytest.raises(CoreskipError, match="above 0 and at most 1"):
        check_share("keep", value)


def test_kmeans_finds_planted_clusters() -> None:
    torch.manual_seed(0)
    centres = torch.randn(5, 12) * 8
    truth = torch.arange(60) % 5
    points = centres[truth] + torch.randn(60, 12) * 0.3
    centroids, assignment = kmeans_elbow(points, seed=0)
    assert centroids.shape[0] >= 4
    for cluster in assignment.unique():
        members = truth[assignment == cluster]
        if centroids.shape[0] >= 5:
            assert (members == members[0]).all()
    assert torch.equal(torch.cdist(points, centroids).argmin(1), assignment)


def test_kmeans_is_repeatable_and_takes_few_points() -> None:
    points = torch.randn(3, 6)
    one, two = kmeans_elbow(points, seed=4), kmeans_elbow(points, seed=4)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert one[0].shape[0] <= 3


def test_similar_sentences_share_a_set() -> None:
    """Two topics that use disjoint halves of the neurons end up in clusters that keep the right half."""
    torch.manual_seed(0)
    norms = [torch.ones(16)] * 2
    counter = SentenceCounter(norms, "signed", 0.5)
    for sentence in range(24):
        half = slice(0, 8) if sentence % 2 else slice(8, 16)
        for layer in range(2):
            a = torch.full((10, 16), -1.0)
            a[:, half] = torch.rand(10, 8) + 0.1
            counter(layer, a)
    clusters = cluster_sentences(counter.counts(), keep=0.5, seed=0)
    prompt = torch.zeros(2, 16)
    prompt[0, :8], prompt[1, 8:] = 5.0, 5.0
    first, second = nearest_cluster(prompt, clusters.centroids, 0.5).tolist()
    assert first != second
    assert clusters.sets[0][first].tolist() == list(range(8))
    assert clusters.sets[1][second].tolist() == list(range(8, 16))
    assert core_membership(prompt, 0.5).sum(1).tolist() == [8.0, 8.0]
