"""Pseudo-perplexity: which tokens are hidden, and what the model sees."""

import math

import pytest
import torch

from lowbit.errors import DataError, RecipeError
from lowbit.evaluate import pseudo_perplexity
from lowbit.evaluate.masked import hidden_places

MASK, CLS, SEP = 90, 91, 92


def stream(n):
    return torch.randint(0, 90, (n,), generator=torch.Generator().manual_seed(1))


def uniform(ids):
    return torch.zeros(*ids.shape, 97)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    got = pseudo_perplexity(uniform, stream(200), MASK, context=40)
    assert got.perplexity == pytest.approx(97, rel=1e-6)
    assert (got.windows, got.tokens, got.protocol) == (5, 5 * 6, "masked")


def test_hidden_tokens_are_masked_and_scored_and_nothing_else_is():
    seen = []
    table = torch.randn(97, generator=torch.Generator().manual_seed(0))

    def model(ids):
        seen.append(ids.clone())
        return table.expand(*ids.shape, 97)

    ids = stream(36).view(2, 18)
    got = pseudo_perplexity(model, ids, MASK, cls_id=CLS, sep_id=SEP, batch=2)
    assert seen[0].shape == (2, 20) and got.context == 20
    assert (seen[0][:, 0] == CLS).all() and (seen[0][:, -1] == SEP).all()
    hidden = seen[0][:, 1:-1] == MASK
    assert hidden.sum(1).tolist() == [3, 3]  # round(0.15 * 18)
    assert (seen[0][:, 1:-1][~hidden] == ids[~hidden]).all()
    assert got.nll == pytest.approx(float(-table.double().log_softmax(0)[ids[hidden]].mean()), rel=1e-6)


def test_batch_order_and_seed():
    def model(ids):  # looks at what is hidden
        return torch.nn.functional.one_hot(ids.roll(1, 1), 97).float()

    ids = stream(160).view(8, 20)
    one = pseudo_perplexity(model, ids, MASK)
    assert pseudo_perplexity(model, ids.flip(0), MASK).nll == one.nll
    assert pseudo_perplexity(model, ids, MASK, batch=3).nll == one.nll
    assert pseudo_perplexity(model, ids, MASK, seed=1).nll != one.nll


def test_context_counts_the_special_tokens():
    got = pseudo_perplexity(uniform, stream(100), MASK, context=20, cls_id=CLS, sep_id=SEP)
    assert (got.windows, got.context) == (5, 20)


def test_places_are_pinned():  # changing this line changes published figures
    assert hidden_places(torch.arange(40), 0.15, 0).tolist() == [8, 12, 18, 26, 35, 39]
    assert len(hidden_places(torch.arange(3), 0.15, 0)) == 1
    assert hidden_places(torch.arange(3), 1.0, 0).tolist() == [0, 1, 2]


def test_tiny_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    got = pseudo_perplexity(transformers.BertForMaskedLM(config), stream(64), MASK, context=32)
    assert 30 < got.perplexity < 300 and math.isfinite(got.nll_stderr)
    with pytest.raises(DataError, match="token id 97"):
        pseudo_perplexity(transformers.BertForMaskedLM(config), stream(64), 97, context=32)


def test_messages():
    with pytest.raises(RecipeError, match="fraction=0"):
        pseudo_perplexity(uniform, stream(64), MASK, fraction=0)
    with pytest.raises(DataError, match="64 tokens and one window needs 510"):
        pseudo_perplexity(uniform, stream(64), MASK, cls_id=CLS, sep_id=SEP)
