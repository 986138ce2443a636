"""Generation against transformers' own greedy decoding, and its parts against slow obvious code."""

import json

import pytest
import torch

from lowbit.errors import DataError, ModelError, RecipeError
from lowbit.runtime.generation import generate, generate_batch
from lowbit.runtime.prompts import eos_ids
from lowbit.runtime.sampling import Sampler
from lowbit.runtime.text_stream import Detokenizer, StopStrings

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

BOS, EOS = 256, 257
VOCABULARY = 260
TEXT = "Grüße, 漢字 and 👋🏽 naïve\n  two  spaces"
TEMPLATE = (
    "{% for m in messages %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def fast(raw, **special):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, no merges: 256 bytes, <s>, </s>. Every character beyond ASCII is several tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens(["<s>", "</s>"])
    return fast(raw, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def spaced():
    """SentencePiece manner: the space belongs to the word after it, unknown characters fall back to bytes."""
    words = ["<unk>", "▁", "▁the", "▁cat", "▁sat", "s", "."]
    vocabulary = {w: i for i, w in enumerate(words + [f"<0x{b:02X}>" for b in range(256)])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    d = tokenizers.decoders
    raw.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    return fast(raw)


def tiny(kind, **options):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=BOS, eos_token_id=EOS
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # default weights hardly depend on the input: every answer would be one repeated token
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) * 0.4)
    return model.eval()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return tiny(request.param)


def ids_of(*args, **options):
    return list(generate(*args, **options).result().token_ids)


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize("prompt", ["a", "Grüße, 漢字"])
def test_greedy_equals_transformers(model, tokenizer, prompt):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    want = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=EOS
    )[0, ids.shape[1] :].tolist()
    assert len(set(want)) > 4  # not one token over and over: the test can see something
    assert ids_of(model, tokenizer, prompt, max_new_tokens=12) == want
    assert ids_of(model, tokenizer, prompt, max_new_tokens=12, cache=False) == want


def test_the_cache_is_used(model, tokenizer, monkeypatch):
    lengths = []
    forward = type(model).forward

    def spy(self, ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        lengths.append(ids.shape[1])
        return forward(self, ids, past_key_values=past_key_values, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", spy)
    n = generate(model, tokenizer, "Hello", max_new_tokens=4).result().new_tokens
    assert lengths == [5] + [1] * (n - 1)
    lengths.clear()
    generate(model, tokenizer, "Hello", max_new_tokens=4, cache=False).result()
    assert lengths == [5, 6, 7, 8][:n]


def test_pieces_join_to_the_decoded_whole(model, tokenizer):
    for seed in range(2):
        stream = generate(model, tokenizer, "x", max_new_tokens=16, temperature=2.0, seed=seed)
        pieces = list(stream)
        got = stream.result()
        assert "".join(pieces) == got.text == tokenizer.decode(got.token_ids, skip_special_tokens=True)
        assert all(pieces)


def test_seeds_reproduce_and_differ(model, tokenizer):
    runs = [ids_of(model, tokenizer, "x", max_new_tokens=8, temperature=1.5, seed=s) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    state = torch.random.get_rng_state()
    ids_of(model, tokenizer, "x", max_new_tokens=2, temperature=1.5, seed=5)
    assert torch.equal(state, torch.random.get_rng_state())  # nobody else's randomness is touched


def test_top_k_one_and_tiny_top_p_are_greedy(model, tokenizer):
    greedy = ids_of(model, tokenizer, "abc", max_new_tokens=8)
    assert ids_of(model, tokenizer, "abc", max_new_tokens=8, temperature=3.0, top_k=1) == greedy
    assert ids_of(model, tokenizer, "abc", max_new_tokens=8, temperature=3.0, top_p=1e-9) == greedy


def test_eos_of_any_holder_ends_the_answer(tokenizer):
    model = tiny("llama")
    free = ids_of(model, tokenizer, "Hello", max_new_tokens=12)
    end = free[5]
    n = free.index(end) + 1
    for holder, value in ((model.generation_config, [1, end]), (model.config, end)):
        before, holder.eos_token_id = holder.eos_token_id, value
        got = generate(model, tokenizer, "Hello", max_new_tokens=12).result()
        assert (got.finish_reason, list(got.token_ids)) == ("eos", free[:n])
        assert got.text == tokenizer.decode(free[: n - 1])
        holder.eos_token_id = before
    assert eos_ids(model, tokenizer) == {EOS}


def test_stop_strings_end_the_answer(model, tokenizer):
    whole = generate(model, tokenizer, "Hello", max_new_tokens=12).result().text
    stop = whole[4:7]
    stream = generate(model, tokenizer, "Hello", max_new_tokens=12, stop=["never to be seen", stop])
    pieces = list(stream)
    assert "".join(pieces) == whole[: whole.find(stop)] == stream.result().text
    assert stream.result().finish_reason == "stop"
    assert generate(model, tokenizer, "Hello", max_new_tokens=12, stop="never").result().text == whole


def test_figures(model, tokenizer):
    got = generate(model, tokenizer, "Hello", max_new_tokens=5).result()
    assert (got.prompt_tokens, got.new_tokens, got.finish_reason) == (5, 5, "length")
    assert got.prefill_tokens_per_second == pytest.approx(5 / got.prefill_seconds)
    assert got.decode_tokens_per_second == pytest.approx(4 / got.decode_seconds)
    assert json.loads(json.dumps(got.as_dict()))["token_ids"] == list(got.token_ids)


def test_no_new_tokens(model, tokenizer):
    stream = generate(model, tokenizer, "Hello", max_new_tokens=0)
    assert list(stream) == []
    got = stream.result()
    assert (got.text, got.prompt_tokens, got.new_tokens, got.finish_reason) == ("", 5, 0, "length")
    assert got.prefill_tokens_per_second == got.decode_tokens_per_second == 0


def test_closing_early(model, tokenizer):
    stream = generate(model, tokenizer, "Hello", max_new_tokens=50)
    first = next(stream)
    stream.close()
    got = stream.result()
    assert (got.text, got.finish_reason) == (first, "closed") and got.new_tokens < 50


def test_a_full_context_ends_the_answer(model, tokenizer):
    got = generate(model, tokenizer, "x" * 60, max_new_tokens=100).result()
    assert (got.finish_reason, got.new_tokens) in (("context", 5), ("eos", got.new_tokens))
    assert generate(model, tokenizer, "x" * 64, max_new_tokens=100).result().new_tokens == 1
    with pytest.raises(DataError, match=r"the prompt has 70 tokens, .* at most 64: shorten it by 6 tokens"):
        generate(model, tokenizer, "x" * 70)


def test_training_mode_is_left_alone_and_dropout_is_off(tokenizer):
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    assert ids_of(model, tokenizer, "ab", max_new_tokens=9) == ids_of(tiny("gpt2"), tokenizer, "ab", max_new_tokens=9)
    assert model.training and not model.transformer.h[0].mlp.training


# ---------------------------------------------------------------- engines and batches


@pytest.fixture(scope="module")
def packed():
    from tests.runtime.tiny_models import pack_model

    return pack_model(tiny("llama"))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 3}, {"stop": "q"}])
def test_the_native_loop_answers_as_the_module_does(packed, tokenizer, options):
    native, module = (
        generate(packed, tokenizer, "Hello there", max_new_tokens=20, engine=e, **options).result()
        for e in ("auto", "module")
    )
    assert (native.engine, native.note, module.engine) == ("native", None, "module")
    assert (native.token_ids, native.text, native.finish_reason) == (
        module.token_ids, module.text, module.finish_reason
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["native", "module"])
def test_a_batch_answers_as_its_prompts_alone(packed, tokenizer, engine):
    prompts = ["a", "Grüße, 漢字", "", "x" * 58]  # the last one fills the context
    options = {"max_new_tokens": 9, "temperature": 1.0, "engine": engine}
    batch = generate_batch(packed, tokenizer, prompts, **options)
    pieces = list(batch)
    got = batch.results()
    assert len({n for n, _ in pieces[: 2 * len(prompts)]}) > 1  # they advance together
    for i, prompt in enumerate(prompts):
        alone = generate(packed, tokenizer, prompt, **options).result()
        assert (got[i].token_ids, got[i].text, got[i].finish_reason) == (
            alone.token_ids, alone.text, alone.finish_reason
        )  # fmt: skip
        assert "".join(p for n, p in pieces if n == i) == got[i].text
    assert got[3].finish_reason in ("context", "eos") and got[3].new_tokens <= 7
    with pytest.raises(RecipeError, match="no prompt"):
        generate_batch(packed, tokenizer, [])


def test_an_8_bit_cache_in_a_long_answer(packed, tokenizer):
    exact, rounded = (
        generate(packed, tokenizer, "Hello there", max_new_tokens=30, kv_bits=b).result() for b in (32, 8)
    )
    assert rounded.engine == "native" and rounded.token_ids[:2] == exact.token_ids[:2]


# ---------------------------------------------------------------- the prompt


def test_empty_prompt_starts_from_bos(model, tokenizer):
    assert generate(model, tokenizer, "", max_new_tokens=1).result().prompt_tokens == 1
    with_bos = ids_of(model, tokenizer, "<s>", max_new_tokens=6)
    assert ids_of(model, tokenizer, "", max_new_tokens=6) == with_bos


def test_chat_template(tokenizer):
    model = tiny("llama")
    chatty = fast(tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    chatty.chat_template = TEMPLATE
    written = "<user>Hi\n<assistant>"
    want = ids_of(model, tokenizer, written, max_new_tokens=6)
    assert ids_of(model, chatty, "Hi", max_new_tokens=6) == want  # chat=None: there is a template, so it is used
    assert ids_of(model, chatty, "Hi", max_new_tokens=6, chat=True) == want
    assert ids_of(model, chatty, written, max_new_tokens=6, chat=False) == want
    got = generate(model, chatty, "Hi", system="Be kind", max_new_tokens=6).result()
    assert list(got.token_ids) == ids_of(model, tokenizer, "<system>Be kind\n" + written, max_new_tokens=6)
    with pytest.raises(DataError, match="chat is off"):
        generate(model, chatty, "Hi", system="Be kind", chat=False)
    with pytest.raises(DataError, match="no chat template"):
        generate(model, tokenizer, "Hi", chat=True)
    chatty.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(DataError, match="role system and user: no system here"):
        generate(model, chatty, "Hi", system="Be kind")


@pytest.mark.parametrize("form", [list, lambda i: {"input_ids": i}, lambda i: {"input_ids": [i]}])
def test_every_form_of_a_filled_template_is_read(tokenizer, form, monkeypatch):
    chatty = fast(tokenizer.backend_tokenizer, eos_token="</s>")
    chatty.chat_template = TEMPLATE
    monkeypatch.setattr(chatty, "apply_chat_template", lambda *a, **k: form(tokenizer("Hello")["input_ids"]))
    model = tiny("llama")
    assert ids_of(model, chatty, "-", max_new_tokens=6) == ids_of(model, tokenizer, "Hello", max_new_tokens=6)


def test_messages(tokenizer):
    model = tiny("llama")
    for options, message in (
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"stop": ["a", ""]}, "empty stop string"),
    ):
        with pytest.raises(RecipeError, match=message):
            generate(model, tokenizer, "x", **options)
    small = tiny("llama")
    small.config.vocab_size = 10
    with pytest.raises(DataError, match="the model has 10 tokens: this tokenizer belongs to another model"):
        generate(small, tokenizer, "x")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ModelError, match="BertForMaskedLM does not continue text"):
        generate(transformers.BertForMaskedLM(config), tokenizer, "x")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ModelError, match="logits are NaN"):
        generate(model, tokenizer, "x").result()


# ---------------------------------------------------------------- sampling


def test_few_candidates_give_what_a_full_sort_gives(monkeypatch):
    from lowbit.runtime import sampling

    torch.manual_seed(3)
    for flat in (False, True):
        logits = (torch.randn(3000) * (0.01 if flat else 3)).round(decimals=2)  # ties
        for top_k, top_p in ((0, 0.3), (0, 0.95), (40, 1.0), (40, 0.5), (700, 0.999), (0, 1.0)):
            few = Sampler(0.8, top_k, top_p).probabilities(logits)
            monkeypatch.setattr(sampling, "CANDIDATES", 3000)
            assert torch.equal(few, Sampler(0.8, top_k, top_p).probabilities(logits))
            monkeypatch.undo()


def slow_probabilities(logits, temperature, top_k, top_p):
    p = {i: float(v) for i, v in enumerate((torch.tensor(logits).double() / temperature).softmax(0))}
    ranked = sorted(p, key=lambda i: (-logits[i], i))
    ranked = ranked[: top_k or None]
    total = sum(p[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        if mass < top_p:
            kept.append(i)
        mass += p[i] / total
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [0.1, 0.55, 0.9, 1.0])
def test_probabilities_equal_slow_ones(temperature, top_k, top_p):
    logits = [0.5, 2.0, -1.0, 2.0, 1.25, 0.0, float("-inf")]
    got = Sampler(temperature, top_k, top_p).probabilities(torch.tensor(logits))
    assert got.tolist() == pytest.approx(slow_probabilities(logits, temperature, top_k, top_p), abs=1e-6)


def test_draws_follow_the_probabilities():
    sampler, logits = Sampler(1.0, seed=0), torch.tensor([0.0, 1.0, 2.0])
    counts = torch.zeros(3)
    for _ in range(2000):
        counts[sampler(logits)] += 1
    assert torch.allclose(counts / 2000, logits.softmax(0), atol=4 * 0.5 / 2000**0.5)  # 4 standard deviations


def test_tiny_temperature_does_not_overflow():
    assert Sampler(1e-30)(torch.tensor([1.0, 3.0, 2.0])) == 1


# ---------------------------------------------------------------- text


def test_no_piece_holds_half_a_character(tokenizer):
    d = Detokenizer(tokenizer)
    pieces = [d.add(i) for i in tokenizer(TEXT)["input_ids"]]
    assert "".join(pieces) == TEXT and d.flush() == ""
    assert not any("\ufffd" in p for p in pieces)
    assert [p for p in pieces if p][:4] == ["G", "r", "ü", "ß"]


def test_invalid_bytes_are_shown_in_the_end(tokenizer):
    ids = tokenizer("a漢")["input_ids"]
    d = Detokenizer(tokenizer)
    assert [d.add(i) for i in ids[:-1]] == ["a", "", ""]
    assert d.flush() == tokenizer.decode(ids[:-1])[1:] == "\ufffd"
    d = Detokenizer(tokenizer)
    ids = [*ids[:-1], *tokenizer("b")["input_ids"]]
    assert "".join(d.add(i) for i in ids) == tokenizer.decode(ids) == "a\ufffdb"


def test_spaces_of_sentencepiece_tokens(spaced):
    words = spaced.convert_tokens_to_ids(["▁the", "▁cat", "s", "▁sat", "▁", "▁", "."])
    d = Detokenizer(spaced)
    assert [d.add(i) for i in words] == ["the", " cat", "s", " sat", " ", " ", "."]
    after = Detokenizer(spaced, words[:1])  # continuing a prompt keeps the space between
    assert [after.add(i) for i in words[1:4]] == [" cat", "s", " sat"]


def test_byte_fallback(spaced):
    raw = [
        *spaced.convert_tokens_to_ids(["▁the", "▁"]),
        *(spaced.convert_tokens_to_ids(f"<0x{b:02X}>") for b in "é漢".encode()),
    ]
    d = Detokenizer(spaced)
    assert [d.add(i) for i in raw] == ["the", " ", "", "é", "", "", "漢"]


def test_special_tokens_are_silent(tokenizer):
    d = Detokenizer(tokenizer)
    a, b = tokenizer("ab")["input_ids"]
    assert [d.add(i) for i in (BOS, a, EOS, b)] == ["", "a", "", "b"]


@pytest.mark.parametrize("stops", [["END"], ["aab", "b"], ["<|e|>", "<|end|>"], ["xyx"]])
def test_stop_strings_whatever_the_pieces(stops):
    for text in ("some EN ENEND more", "aaaabaa", "a<|<|e|<|end|>x", "xyxyxx", "xy", ""):
        places = [text.find(s) for s in stops if s in text]
        want = text[: min(places)] if places else text
        for size in (1, 2, 3, 100):
            s, out = StopStrings(stops), ""
            for i in range(0, len(text), size):
                out += s.add(text[i : i + size])
                if s.found:
                    break
            assert (out if s.found else out + s.flush()) == want
            assert s.found == bool(places)
