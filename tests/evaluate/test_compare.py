"""Agreement of two models against slow sums in float64."""

import pytest
import torch

from lowbit.errors import DataError, ModelError
from lowbit.evaluate import _model, compare, perplexity


def lookup(seed, noise=0.0, vocabulary=31):
    g = torch.Generator().manual_seed(0)
    table = torch.randn(vocabulary, vocabulary, generator=g)
    table = table + noise * torch.randn(table.shape, generator=torch.Generator().manual_seed(seed))
    return lambda ids: table[ids]


def stream(n):
    return torch.randint(0, 31, (n,), generator=torch.Generator().manual_seed(1))


def test_a_model_agrees_with_itself():
    got = compare(lookup(0), lookup(0), stream(100), context=20)
    assert (got.kl, got.top1_agreement, got.max_relative_logit_difference) == (0, 1, 0)
    assert (got.windows, got.tokens, got.context) == (5, 100, 20)


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
def test_slow_sums(monkeypatch, rows):
    monkeypatch.setattr(_model, "CHUNK", rows * 31)
    ids, q, p = stream(100), lookup(3, noise=0.7), lookup(0)
    got = compare(q, p, ids.view(5, 20))
    lq, lp = q(ids).double(), p(ids).double()
    probability = lp.softmax(1)
    kl = (probability * (probability.log() - lq.softmax(1).log())).sum(1)
    assert got.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert got.kl_stderr == pytest.approx(float(kl.std()) / 10, rel=1e-4)
    assert got.top1_agreement == pytest.approx(float((lq.argmax(1) == lp.argmax(1)).double().mean()))
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(lq, lp, strict=True))
    assert got.max_relative_logit_difference == pytest.approx(worst, rel=1e-5)
    assert got.perplexity == pytest.approx(perplexity(q, ids.view(5, 20)).perplexity, rel=1e-6)
    assert got.reference_perplexity == pytest.approx(perplexity(p, ids.view(5, 20)).perplexity, rel=1e-6)


def test_kl_is_not_symmetric_and_puts_the_reference_first():
    sure, unsure = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 0.0])
    a = compare(lambda i: unsure.expand(*i.shape, 2), lambda i: sure.expand(*i.shape, 2), torch.zeros(1, 8).long())
    assert a.kl == pytest.approx(0.6924, abs=1e-3)  # almost log 2; the other way round it is about 3.8


def test_messages_and_progress():
    seen = []
    compare(lookup(0), lookup(0), stream(40), context=20, progress=lambda *a: seen.append(a))
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(ModelError, match="different vocabularies"):
        compare(lookup(0, vocabulary=40), lookup(0), stream(40), context=20)
    with pytest.raises(ModelError, match="window 0: logits are NaN"):
        compare(lookup(0, noise=float("nan")), lookup(0), stream(40), context=20)
    with pytest.raises(DataError, match="40 tokens and one window needs 512"):
        compare(lookup(0), lookup(0), stream(40))
