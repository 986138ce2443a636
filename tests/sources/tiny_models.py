"""Tiny models, tokenizers and GGUF files, made from nothing."""

from pathlib import Path

import gguf
import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB, WIDTH, HEADS, KV_HEADS, MLP, LAYERS = 64, 32, 4, 2, 64, 2
WIDE = {"hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
ROPE = {**WIDE, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**ROPE, **ENDS, tie_word_embeddings=True),
    "qwen2": lambda: hf.Qwen2Config(**ROPE, **ENDS, tie_word_embeddings=False),
    "mistral": lambda: hf.MistralConfig(**ROPE, **ENDS, tie_word_embeddings=False),
    "gpt2": lambda: hf.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64, **ENDS),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=64, word_embed_proj_dim=WIDTH, **ENDS,
    ),
    "bert": lambda: hf.BertConfig(**WIDE, vocab_size=VOCAB, max_position_embeddings=64),
}  # fmt: skip


def model(kind: str) -> torch.nn.Module:
    """Random weights everywhere, biases and norms too, so that a swap shows."""
    cls = hf.AutoModelForMaskedLM if kind == "bert" else hf.AutoModelForCausalLM
    net = cls.from_config(CONFIGS[kind]()).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return net


def tokenizer(words: int = VOCAB, tmp: Path | None = None) -> hf.PreTrainedTokenizerFast:
    """Words w3, w4, ... split at spaces; ids 0 to 2 are pad, bos, eos."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=16
    )


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rotating rows, written out row by row: stored[2i + j] = w[j * d/2 + i] within each head."""
    d = len(w) // heads
    rows = [h * d + j * d // 2 + i for h in range(heads) for i in range(d // 2) for j in (0, 1)]
    return w[rows]


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
Q, F = gguf.GGMLQuantizationType, gguf.LlamaFileType
STORED_AS = {"ffn_down": Q.Q4_0, "ffn_up": Q.Q8_0, "attn_q": Q.Q8_0, "attn_v": Q.F16, "ffn_gate": Q.BF16}


def stored_name(name: str) -> str:
    base = name.removesuffix(".weight")
    if base in TOP_NAMES:
        return TOP_NAMES[base] + ".weight"
    _, _, layer, part = base.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def write_llama_gguf(path: Path, tied: bool = True) -> dict[str, torch.Tensor]:
    """A random Llama in mixed types; returns what must be read back, by transformers' names."""
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = tied
    net = hf.AutoModelForCausalLM.from_config(config)
    w = gguf.GGUFWriter(str(path), "llama")
    _write_metadata(w)
    truth = {}
    for name, tensor in net.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        a = torch.randn_like(tensor).numpy()
        stored, heads = stored_name(name), {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2], 0)
        kind = STORED_AS.get(stored.split(".")[-2], Q.F32)
        quants = gguf.quantize(a, kind)
        truth[name] = torch.from_numpy(gguf.dequantize(quants, kind).astype(np.float32).reshape(a.shape))
        w.add_tensor(stored, np.ascontiguousarray(permuted(quants, heads)) if heads else quants, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return truth


def _write_metadata(w: gguf.GGUFWriter) -> None:
    w.add_name("tiny")
    w.add_block_count(LAYERS)
    w.add_context_length(64)
    w.add_embedding_length(WIDTH)
    w.add_feed_forward_length(MLP)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_rope_freq_base(5000.0)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_file_type(F.MOSTLY_Q8_0)
    alphabet = [chr(c) for c in range(ord("!"), ord("!") + VOCAB - 5)]
    w.add_tokenizer_model("gpt2")
    w.add_token_list(["<pad>", "<s>", "</s>", *alphabet, '"#', '!"'])
    w.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    w.add_token_merges(['! "', '" #'])  # two: transformers before 4.52 misreads a list of one
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_pad_token_id(0)
    w.add_chat_template("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")
