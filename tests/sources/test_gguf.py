"""GGUF: a random Llama written with the gguf package comes back bit for bit; damaged files are refused."""

import struct
from pathlib import Path

import pytest
import torch

from lowbit.errors import ModelError
from lowbit.sources import fill, open_model
from lowbit.sources.gguf_header import config_stub, read_header
from tests.sources import tiny_models as tiny


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tiny.write_llama_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_exact(tmp_path, tied):
    truth = tiny.write_llama_gguf(tmp_path / "tiny.gguf", tied)
    source = open_model(tmp_path)  # the folder holds exactly one .gguf
    assert source.kind == "gguf" and set(source) == set(truth)
    assert source.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    for name, w in truth.items():
        assert torch.equal(source.get(name), w), name
        assert source.get(name).dtype == torch.float32 and source.get(name).data_ptr() % 64 == 0
    net = source.new_skeleton()
    fill(net, source)
    assert net(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_row_chunks_make_no_difference(file, monkeypatch):
    from lowbit.sources import gguf

    source = open_model(file)
    whole = {n: source.get(n) for n in source}
    monkeypatch.setattr(gguf, "ROWS_ELEMENTS", 3 * tiny.WIDTH)
    assert all(torch.equal(source.get(n), w) for n, w in whole.items())


def test_configuration(file):
    config = open_model(file).config
    assert (config.hidden_size, config.num_key_value_heads, config.vocab_size) == (32, 2, tiny.VOCAB)
    assert config.architectures == ["LlamaForCausalLM"] and config.tie_word_embeddings
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    assert rope["rope_theta"] == 5000.0


def test_stub_is_small_and_readable(file, tmp_path):
    stub = tmp_path / "stub"
    stub.write_bytes(config_stub(read_header(file)))
    again = read_header(stub)
    assert list(again.tensors) == list(read_header(file).tensors)
    assert again.counts["tokenizer.ggml.tokens"] == 1 and stub.stat().st_size < file.stat().st_size / 4


def test_tokenizer_and_chat_template(file):
    tokenizer = open_model(file).load_tokenizer()
    assert tokenizer('!"', add_special_tokens=False)["input_ids"] == [tiny.VOCAB - 1]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "!"}], tokenize=False)
    assert text == "<s>!</s>" and tokenizer.eos_token_id == 2


@pytest.mark.slow
def test_real_model_equals_transformers(assets):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = next((assets / "models" / "smollm2-135m-instruct").glob("*.gguf"))
    source = open_model(path)
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=source.new_skeleton())["tensors"]
    assert set(source) == set(theirs) and len(theirs) > 200
    for name in source:
        assert torch.equal(source.get(name), theirs.pop(name)), name


# ------------------------------------------------------------ damage


def test_truncated_anywhere(file):
    data = file.read_bytes()
    for n in (0, 3, 4, 23, 24, 60, 500, len(data) // 3, len(data) // 2, len(data) - 33):
        file.write_bytes(data[:n])
        with pytest.raises(ModelError, match=r"again|begin with 'GGUF'"):
            open_model(file)


def test_cut_tensor_is_named(file):
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"tensor '\S+' ends at byte \d+, but the file has \d+: it is cut off"):
        open_model(file)


def patched(file: Path, place: int, data: bytes) -> Path:
    whole = bytearray(file.read_bytes())
    whole[place : place + len(data)] = data
    file.write_bytes(whole)
    return file


def row_of(file: Path, name: bytes) -> int:
    """Place of a tensor's entry in the table, after its name: u32 dims, u64 * dims, u32 type, u64 offset."""
    return file.read_bytes().index(name) + len(name)


HUGE = struct.pack("<Q", 1 << 62)
DAMAGE = {
    "version": (lambda f: 4, struct.pack("<I", 9), "version 9 GGUF"),
    "big endian": (lambda f: 4, struct.pack(">I", 3), "big-endian"),
    "tensor count": (lambda f: 8, HUGE, "more entries"),
    "metadata count": (lambda f: 16, HUGE, "more entries"),
    "key length": (lambda f: 24, HUGE, "ends inside its own header"),
    "array length": (lambda f: row_of(f, b"tokenizer.ggml.tokens") + 8, HUGE, "array of"),
    "value type": (lambda f: row_of(f, b"llama.block_count"), struct.pack("<I", 77), "unknown type 77"),
    "dimensions": (lambda f: row_of(f, b"token_embd.weight"), struct.pack("<I", 9), "9 dimensions"),
    "zero size": (lambda f: row_of(f, b"token_embd.weight") + 4, bytes(8), "does not divide"),
    "size": (lambda f: row_of(f, b"token_embd.weight") + 12, HUGE, "cut off"),
    "tensor type": (lambda f: row_of(f, b"token_embd.weight") + 20, struct.pack("<I", 999), "unknown type 999"),
    "offset": (lambda f: row_of(f, b"token_embd.weight") + 24, HUGE, "cut off"),
    "other shape": (
        lambda f: row_of(f, b"token_embd.weight") + 4,
        struct.pack("<QQ", 16, 128),
        r"has shape \[128, 16\]",
    ),
    "swapped shape": (
        lambda f: row_of(f, b"token_embd.weight") + 4,
        struct.pack("<QQ", 64, 32),
        r"has shape \[32, 64\]",
    ),
    "architecture": (lambda f: row_of(f, b"general.architecture") + 12, b"lxama", "transformers cannot use"),
    "a twin": (lambda f: f.read_bytes().index(b"blk.1.attn_q"), b"blk.0.attn_q", "two tensors are called"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_every_number_is_distrusted(file, what):
    place, data, message = DAMAGE[what]
    with pytest.raises(ModelError, match=message):
        source = open_model(patched(file, place(file), data))
        for name in source:
            source.get(name)


def test_random_damage_never_crashes(file):
    """Flipped header bytes: either refused with our error, or read with the right shapes."""
    data = file.read_bytes()
    end = data.index(b"output_norm.weight") + 60
    places = torch.randint(end, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    for place in places:
        file.write_bytes(data[:place] + bytes([data[place] ^ 0x81]) + data[place + 1 :])
        try:
            source = open_model(file)
            shapes = [tuple(source.get(n).shape) == source.shape(n) for n in source]
        except ModelError:
            continue
        assert all(shapes)


def test_texts_and_two_files(tmp_path, file):
    page = tmp_path / "page.gguf"
    page.write_text("<html>not found</html>")
    with pytest.raises(ModelError, match="is a text, not a GGUF"):
        open_model(page)
    with pytest.raises(ModelError, match=r"has 2 \.gguf files; name one"):
        open_model(tmp_path)
