"""Perplexity against slow obvious sums, and the checks of the evaluation protocol."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowbit.errors import DataError, ModelError, RecipeError
from lowbit.evaluate import _model, perplexity, plan_windows, tokenize

VOCABULARY = 97


class Bigram(nn.Module):
    """Logits that depend on the token and on its place in the window, so that a wrong window or row shows."""

    def __init__(self, vocabulary=VOCABULARY, longest=512):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=g))
        self.place = nn.Parameter(torch.randn(longest, vocabulary, generator=g))
        self.drop = nn.Dropout(0.5)
        self.calls = []

    def forward(self, ids):
        self.calls.append(tuple(ids.shape))
        return self.drop(self.table[ids] + self.place[: ids.shape[1]])


def uniform(ids):
    return torch.zeros(*ids.shape, VOCABULARY)


def stream(n, seed=1):
    return torch.randint(0, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))


def slow_nll(model, ids):
    """-log p of tokens 1.. of one window, in float64, one token at a time."""
    logits = model.eval()(ids[None])[0].detach().double()
    return [-math.log(float(logits[t - 1].softmax(0)[ids[t]])) for t in range(1, len(ids))]


def test_uniform_model_has_the_vocabulary_as_perplexity():
    for options in ({}, {"stride": 5}, {"protocol": "llama.cpp", "bos": 0}):
        assert perplexity(uniform, stream(100), context=16, **options).perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_windows_side_by_side_equal_the_slow_sum():
    model, ids = Bigram(), stream(70)
    nll = [slow_nll(model, ids[i : i + 16]) for i in (0, 16, 32, 48)]  # the last 6 tokens are dropped
    got = perplexity(model, ids, context=16)
    flat = torch.tensor([v for w in nll for v in w], dtype=torch.float64)
    assert (got.windows, got.tokens, got.context, got.stride) == (4, 60, 16, 16)
    assert got.nll == pytest.approx(float(flat.mean()), rel=1e-6)
    assert got.perplexity == pytest.approx(math.exp(float(flat.mean())), rel=1e-6)
    assert got.nll_stderr == pytest.approx(float(flat.std()) / 60**0.5, rel=1e-5)
    means = torch.tensor([sum(w) / 15 for w in nll], dtype=torch.float64)
    assert got.nll_stderr_windows == pytest.approx(float(means.std()) / 4**0.5, rel=1e-5)
    assert got.window_nll == pytest.approx(means.tolist(), rel=1e-6)
    assert got.tokens_per_second > 0 and got.seconds > 0


def test_batch_and_order_do_not_matter():
    model, ids = Bigram(), stream(7 * 16)
    one = perplexity(model, ids, context=16)
    assert perplexity(model, ids, context=16, batch=3).nll == pytest.approx(one.nll, rel=1e-12)
    assert set(model.calls[-3:]) == {(3, 16), (1, 16)}
    assert perplexity(model, ids.view(7, 16).flip(0)).nll == one.nll  # exactly


def test_one_window_of_the_whole_text_agrees_in_both_formulas():
    model, ids = Bigram(), stream(40)
    whole = perplexity(model, ids, context=40)
    assert whole.nll == pytest.approx(
        float(F.cross_entropy(model.eval()(ids[None])[0, :-1].detach(), ids[1:])), rel=1e-6
    )
    assert whole.nll == perplexity(model, ids, context=40, stride=7).nll
    assert whole.nll_stderr_windows is None


def test_sliding_scores_every_token_once_with_the_longest_context():
    model, ids = Bigram(), stream(41)
    got = perplexity(model, ids, context=16, stride=6)
    nll = slow_nll(model, ids[:16])
    for start, end, new in ((6, 22, 6), (12, 28, 6), (18, 34, 6), (24, 40, 6), (30, 41, 1)):
        nll += slow_nll(model, ids[start:end])[-new:]
    assert got.tokens == 40 == len(nll)
    assert got.nll == pytest.approx(sum(nll) / 40, rel=1e-6)


@pytest.mark.parametrize("n", [16, 17, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("stride", range(1, 16))
def test_sliding_plan_covers_the_text(n, stride):
    spans = plan_windows(n, 16, stride)
    scored = [t for s in spans for t in range(s.start + s.scored, s.end)]
    assert scored == list(range(1, n))
    assert all(s.length <= 16 and s.scored >= 1 for s in spans)


def test_stride_equal_to_context_is_the_default():
    model, ids = Bigram(), stream(70)
    a, b = perplexity(model, ids, context=16, stride=16), perplexity(model, ids, context=16)
    assert (a.nll, a.windows, a.tokens, a.stride) == (b.nll, b.windows, b.tokens, b.stride)


@pytest.mark.parametrize("context", [16, 17])
def test_llama_cpp_scores_the_second_half_after_bos(context):
    model, ids, bos = Bigram(), stream(60), 3
    ids[0] = bos
    got = perplexity(model, ids, context=context, protocol="llama.cpp", bos=bos)
    nll = []
    for i in range(0, 60 - context + 1, context):
        window = ids[i : i + context].clone()
        window[0] = bos
        nll += slow_nll(model, window)[context // 2 :]
    assert got.tokens == 3 * (context - context // 2 - 1) == len(nll)
    assert got.nll == pytest.approx(sum(nll) / len(nll), rel=1e-6)


def test_bos_counts():
    bos, ids = 0, stream(64).clamp(min=1)
    started = torch.cat([torch.tensor([bos]), ids])
    assert perplexity(uniform, started, context=16, bos=bos).bos_count == 1
    assert perplexity(uniform, ids, context=16, bos=bos).bos_count == 0  # gptq counts, never inserts
    assert perplexity(uniform, ids, context=16).bos_count is None
    for text in (started, ids):  # llama.cpp puts one in front where it is missing, then one over each chunk
        got = perplexity(Bigram(), text, context=16, protocol="llama.cpp", bos=bos)
        assert (got.bos_count, got.windows) == (4, 4)
    same = [perplexity(Bigram(), t, context=16, protocol="llama.cpp", bos=bos).nll for t in (started, ids)]
    assert same[0] == same[1]
    assert perplexity(uniform, ids, context=16, protocol="llama.cpp", bos=False).bos_count is None


def test_the_text_is_tokenised_once_and_bos_stands_where_the_tokenizer_puts_it():
    def tokenizer(text, add_special_tokens, verbose):
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    assert tokenize("ab", tokenizer).tolist() == [1, 97, 98]
    assert tokenize("ab", tokenizer, special=False).tolist() == [97, 98]
    with pytest.raises(DataError, match="0 tokens"):
        perplexity(uniform, tokenize("", tokenizer, special=False))


def test_at_most_so_many_windows():
    model, ids = Bigram(), stream(160)
    assert perplexity(model, ids, context=16, windows=3).nll == perplexity(model, ids[:48], context=16).nll
    assert perplexity(model, ids, context=16, windows=99).windows == 10


def test_chunks_of_rows_change_nothing(monkeypatch):
    model, ids = Bigram(), stream(64)
    whole = perplexity(model, ids, context=32).nll
    monkeypatch.setattr(_model, "CHUNK", 5 * VOCABULARY)
    assert perplexity(model, ids, context=32).nll == pytest.approx(whole, rel=1e-12)


def test_half_precision_logits_are_scored_in_float32():
    logits = (torch.randn(9, 1000, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    targets = torch.arange(9)
    exact = -logits.double().log_softmax(1)[torch.arange(9), targets]
    assert torch.allclose(_model.token_nll(logits, targets), exact, rtol=1e-6)


def test_mode_of_every_module_is_restored_and_dropout_is_off():
    model = Bigram().train()
    model.drop.eval()
    ids = stream(32)
    perplexity(model, ids, context=16)
    assert model.training and not model.drop.training
    model.train()
    assert perplexity(model, ids, context=16).nll == perplexity(model, ids, context=16).nll


def test_progress_and_json():
    seen = []
    got = perplexity(Bigram(), stream(70), context=16, batch=3, progress=lambda *a: seen.append(a))
    assert seen == [(3, 4), (4, 4)]
    assert json.loads(json.dumps(got.as_dict()))["window_nll"] == list(got.window_nll)


def test_tiny_language_model_equals_its_own_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = stream(64) % 64
    losses = [float(model(w[None], labels=w[None]).loss.detach()) for w in ids.view(4, 16)]
    assert perplexity(model, ids, context=16).nll == pytest.approx(sum(losses) / 4, rel=1e-5)
    sliding = perplexity(model, ids, context=16, stride=4, batch=2)  # logits_to_keep in use
    assert sliding.nll == pytest.approx(perplexity(lambda i: model(i).logits, ids, context=16, stride=4).nll, rel=1e-5)
    with pytest.raises(DataError, match=r"token id 64 .* the model has 64 tokens.*tokenizer belongs to another"):
        perplexity(model, ids + 1 + (63 - ids.max()), context=16)
    with pytest.raises(DataError, match=r"context=48 is longer than the 32 .* Try context=32"):
        perplexity(model, ids, context=48)


@pytest.mark.parametrize(
    "ids, options, error, message",
    [
        (stream(300), {}, DataError, r"the text has 300 tokens and one window needs 512.*--context 300"),
        (stream(1), {}, DataError, r"has 1 tokens and one window needs 512: give a longer text\."),
        (torch.zeros(0), {}, DataError, "whole numbers"),
        (torch.zeros(0, dtype=torch.int64), {}, DataError, "0 tokens"),
        (torch.zeros(4, 4, 4, dtype=torch.int64), {}, DataError, r"\(4, 4, 4\)"),
        (torch.full((600,), -100), {}, DataError, "-100 is negative"),
        (stream(64), {"context": 16, "stride": 17}, RecipeError, "stride=17 .* stride=8"),
        (stream(64), {"context": 16, "stride": 0}, RecipeError, "stride=0"),
        (stream(64), {"context": 2}, RecipeError, "context=2"),
        (stream(64), {"context": 16, "batch": 0}, RecipeError, "batch=0"),
        (stream(64), {"context": 16, "windows": 0}, RecipeError, "windows=0"),
        (stream(64).view(4, 16), {"stride": 4}, RecipeError, "uncut stream"),
        (stream(64), {"context": 16, "protocol": "llama"}, RecipeError, "Did you mean 'llama.cpp'"),
        (stream(64), {"context": 16, "protocol": "llama.cpp"}, RecipeError, "bos=tokenizer.bos_token_id"),
        (stream(64), {"context": 16, "bos": True}, RecipeError, "bos=True"),
        (stream(64), {"context": 16, "protocol": "llama.cpp", "bos": 1, "stride": 8}, RecipeError, "no stride"),
    ],
)
def test_messages(ids, options, error, message):
    with pytest.raises(error, match=message):
        perplexity(uniform, ids, **options)


def test_a_broken_model_is_named():
    with pytest.raises(ModelError, match=r"window 0: .*NaN"):
        perplexity(lambda ids: uniform(ids) * float("nan"), stream(32), context=16)
    with pytest.raises(ModelError, match="no logits"):
        perplexity(lambda ids: ids, stream(32), context=16)
