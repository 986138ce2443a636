"""The native loop against the model's own forward: logits, caches, batches, and what it leaves to the model."""

from typing import Any

import pytest
import torch

from lowbit.errors import ModelError, RecipeError
from lowbit.formats import Format, quantize, with_exceptions
from lowbit.runtime import PackedEmbedding, PackedLinear, native, set_activations
from lowbit.runtime.engines import NativeEngine, pick
from lowbit.runtime.native import NativeDecoder, why_not
from tests.runtime.tiny_models import pack_model

transformers = pytest.importorskip("transformers")

VOCABULARY = 70
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
IDS = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(1)).tolist()
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 10000.0}  # fmt: skip


def config_of(name: str) -> Any:
    t = transformers
    return {
        "llama": lambda: t.LlamaConfig(**SIZES, tie_word_embeddings=True),
        "biased": lambda: t.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        "wide_heads": lambda: t.LlamaConfig(**SIZES, head_dim=24),
        "llama3_rope": lambda: t.LlamaConfig(**SIZES, rope_scaling=dict(LLAMA3)),
        "mistral": lambda: t.MistralConfig(**SIZES, sliding_window=7),
        "mistral_full": lambda: t.MistralConfig(**SIZES, sliding_window=None),
        "qwen2": lambda: t.Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen2_sliding": lambda: t.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    }[name]()


NAMES = ["llama", "biased", "wide_heads", "llama3_rope", "mistral", "mistral_full", "qwen2", "qwen2_sliding"]


def tiny(name: str) -> Any:
    """Random weights large enough that logits depend on everything; norms and biases that are not ones and zeros."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name))
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.2) + (1 if "norm" in key else 0))
    return model.eval()


def packed(name: str, fmt: str = "uint4-g16", activations: str = "float") -> Any:
    return pack_model(tiny(name), fmt, activations=activations)


def expected(model: Any, ids: "list[int]" = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def read(decoder: NativeDecoder, ids: "list[int]" = IDS, parts: "tuple[int, ...]" = (), kv_bits: int = 32) -> Any:
    """Logits of every row, the ids read in parts of the given lengths."""
    cache, out, at = decoder.cache(1, len(ids), kv_bits), [], 0
    for n in (*parts, len(ids) - sum(parts)):
        out.append(decoder.forward(cache, ids[at : at + n], [0] * n, list(range(n))))
        at += n
    assert cache.length(0) == len(ids)
    return torch.cat(out)


def assert_close(got: torch.Tensor, want: torch.Tensor, relative: float) -> None:
    assert (got - want).abs().max() <= relative * want.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_models_own(name: str) -> None:
    model = packed(name)
    assert_close(read(NativeDecoder(model)), expected(model), 2e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("fmt", ["ternary-g16", "uint3-g16", "nf4-g16", "int8-channel", "uint2-g16"])
def test_every_format_and_int8_activations(name: str, fmt: str) -> None:
    model = packed(name, fmt)
    assert_close(read(NativeDecoder(model)), expected(model), 2e-5)
    set_activations(model, "int8")
    got, want = read(NativeDecoder(model)), expected(model)
    assert (got - want).norm() <= 1e-2 * want.norm()  # a rounding here and there goes the other way
    assert (got - want).abs().median() < 1e-5


@pytest.mark.parametrize("parts", [(1,), (39,), (5, 1, 1, 17), (1,) * 39])
def test_parts_do_not_matter(parts: "tuple[int, ...]") -> None:
    decoder = NativeDecoder(packed("mistral"))
    assert torch.equal(read(decoder, parts=parts), read(decoder))


def test_plain_layers_and_float_models() -> None:
    model = tiny("qwen2")
    assert_close(read(NativeDecoder(model)), expected(model), 2e-5)
    model.model.layers[1].mlp = pack_model(model.model.layers[1].mlp)
    assert_close(read(NativeDecoder(model)), expected(model), 2e-5)


@pytest.mark.parametrize(
    "name", ["layers.1.self_attn.o_proj", "layers.2.self_attn.k_proj", "layers.0.mlp.up_proj", "embed_tokens"]
)
def test_exceptions_are_added(name: str) -> None:
    model = packed("biased")
    owner, _, name = name.rpartition(".")
    owner = model.model.get_submodule(owner)
    old = getattr(owner, name)
    w = torch.randn(old.shape) * 0.3
    outliers = torch.rand(w.shape) < 0.1
    outliers[3] = outliers[:, 5] = False
    qt = with_exceptions(quantize(w, Format.parse("uint4-g16")), w * 3, outliers)
    new = PackedEmbedding if name == "embed_tokens" else PackedLinear
    setattr(owner, name, new.from_quantized(qt, *([] if name == "embed_tokens" else [old.bias])))
    before = expected(model)
    assert_close(read(NativeDecoder(model)), before, 2e-5)
    assert_close(read(NativeDecoder(model), parts=(1, 1, 1, 5)), before, 2e-5)
    set_activations(model, "int8")
    got, want = read(NativeDecoder(model)), expected(model)
    assert (got - want).norm() <= 1e-2 * want.norm() and (got - want).abs().median() < 1e-5
    parts = read(NativeDecoder(model), parts=(1, 1, 1, 5))  # few tokens are rounded to 15 bits for the exceptions
    assert (parts - want).norm() <= 2e-2 * want.norm()


def test_products_of_one_input_in_different_segments() -> None:
    """Query, key and value share the rounding of their input where they cut it alike, and only there."""
    model = packed("biased", "uint4-channel", "int8")
    for name, fmt in (("k_proj", "uint4-g16"), ("v_proj", "int8-channel")):
        layer = model.model.layers[1].self_attn
        old = getattr(layer, name)
        new = PackedLinear.from_quantized(quantize(old.dequantize(), Format.parse(fmt)), old.bias, activations="int8")
        setattr(layer, name, new)
    got, want = read(NativeDecoder(model)), expected(model)
    assert (got - want).norm() <= 1e-2 * want.norm() and (got - want).abs().median() < 1e-5


def test_texts_do_not_see_each_other() -> None:
    decoder = NativeDecoder(packed("llama"))
    texts = [IDS[:3], IDS[10:31], IDS[5:6]]
    cache = decoder.cache(3, 30)
    rows = [(t, i) for i, ids in enumerate(texts) for t in ids]
    ends = [2, 23, 24]
    together = decoder.forward(cache, [t for t, _ in rows], [i for _, i in rows], ends)
    assert torch.equal(together, torch.stack([read(decoder, ids)[-1] for ids in texts]))
    more = decoder.forward(cache, [7, 8, 9], [2, 0, 1], [0, 1, 2])  # any order
    alone = [read(decoder, texts[i] + [t])[-1] for t, i in ((7, 2), (8, 0), (9, 1))]
    assert torch.equal(more, torch.stack(alone))


def test_threads_and_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("wide_heads")  # plain layers: all of the loop's own arithmetic, none of the packed kernels'
    want = read(NativeDecoder(model))
    monkeypatch.setenv("LOWBIT_ISA", "scalar")
    assert torch.equal(read(NativeDecoder(model)), want)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    assert torch.equal(read(NativeDecoder(model)), want)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["llama", "mistral", "wide_heads"])
def test_an_8_bit_cache_is_close_and_small(name: str) -> None:
    decoder = NativeDecoder(packed(name))
    exact, rounded = read(decoder), read(decoder, kv_bits=8)
    assert 0 < (exact - rounded).norm() < 0.03 * exact.norm()
    assert torch.equal(rounded, read(decoder, parts=(3, 1, 20), kv_bits=8))
    small, large = (decoder.cache(1, 64, b) for b in (8, 32))
    for cache in (small, large):
        decoder.forward(cache, IDS, [0] * len(IDS), [])
    assert small.nbytes() < 0.4 * large.nbytes()
    assert large.nbytes() == 40 * 3 * 2 * 2 * decoder_dim(name) * 4


def decoder_dim(name: str) -> int:
    return 24 if name == "wide_heads" else 8


def test_long_prompts_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.runtime import engines

    model = packed("llama")
    whole = NativeEngine(model, [50, 50], 32).read([(0, IDS), (1, IDS[:9])])
    monkeypatch.setattr(engines, "PREFILL_ROWS", 7)
    assert torch.equal(NativeEngine(model, [50, 50], 32).read([(0, IDS), (1, IDS[:9])]), whole)
    assert torch.equal(whole[0], read(NativeDecoder(model))[-1])


# ---------------------------------------------------------------- what is left to the model


def fallbacks() -> "dict[str, Any]":
    t = transformers
    small = {"vocab_size": 64, "max_position_embeddings": 64}
    gpt2 = t.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    opt = t.OPTConfig(hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32,
                      **small)  # fmt: skip
    gelu = t.LlamaConfig(**SIZES | {"num_hidden_layers": 1}, hidden_act="gelu")
    dynamic = t.LlamaConfig(**SIZES | {"num_hidden_layers": 1},
                            rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})  # fmt: skip
    return {"GPT2LMHeadModel": gpt2, "OPTForCausalLM": opt, "hidden_act is gelu": gelu, "type dynamic": dynamic}


@pytest.mark.parametrize("reason", ["GPT2LMHeadModel", "OPTForCausalLM", "hidden_act is gelu", "type dynamic"])
def test_models_that_are_not_covered_say_why(reason: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(fallbacks()[reason])
    assert reason in str(why_not(model))
    with pytest.raises(ModelError, match=f"cannot run this model: .*{reason}"):
        NativeDecoder(model)
    engine, note = pick(model, "auto", True, 32)
    assert engine == "module" and reason in str(note)


def test_hooks_and_foreign_layers_are_left_to_the_model() -> None:
    model = packed("llama")
    assert why_not(model) is None
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *a: None)
    assert why_not(model) == "model.layers.1.mlp has forward hooks"
    handle.remove()

    class Adapter(torch.nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj = Adapter(32, 48, bias=False)
    assert why_not(model) == "model.layers.0.mlp.up_proj is a Adapter"


def test_what_cannot_be_had_is_refused() -> None:
    gpt2 = transformers.AutoModelForCausalLM.from_config(fallbacks()["GPT2LMHeadModel"])
    for args, message in (
        ((gpt2, "native", True, 32), "the native loop cannot run here: GPT2LMHeadModel"),
        ((gpt2, "auto", True, 8), "kv_bits=8 needs the native loop"),
        ((packed("llama"), "auto", True, 4), "kv_bits=4 is unknown"),
        ((packed("llama"), "fast", True, 32), "engine='fast' is unknown"),
        ((packed("llama"), "native", False, 32), "cache=False"),
    ):
        with pytest.raises(RecipeError, match=message):
            pick(*args)
    assert pick(packed("llama"), "auto", True, 8) == ("native", None)
    assert pick(tiny("llama"), "auto", True, 32) == ("module", "no linear layer is packed")


def test_wrong_numbers_are_refused_and_leave_the_cache_as_it_was() -> None:
    decoder = NativeDecoder(packed("llama"))
    cache = decoder.cache(2, 4)
    decoder.forward(cache, [1, 2], [0, 0], [1])
    for ids, sequence, wanted, error, says in (
        ([VOCABULARY], [0], [0], IndexError, "no token"),
        ([-1], [0], [0], IndexError, "no token"),
        ([1], [2], [0], ValueError, "no sequence"),
        ([1], [0], [1], ValueError, "no row"),
        ([1, 1, 1], [0, 0, 0], [0], ValueError, "full"),
        ([1, 1], [0], [0], ValueError, "one length"),
        ([], [], [], ValueError, "one length"),
    ):
        with pytest.raises(error, match=says):
            decoder.forward(cache, ids, sequence, wanted)
    assert (cache.length(0), cache.length(1)) == (2, 0)
    with pytest.raises(RecipeError, match="kv_bits=3"):
        decoder.cache(1, 4, 3)


def test_window_of_older_qwen2_configurations() -> None:
    class Config:
        model_type, sliding_window, use_sliding_window, max_window_layers = "qwen2", 9, True, 2

    assert [native._window(Config, i) for i in range(4)] == [0, 0, 9, 9]
