"""Texts and token windows."""

import json

import pytest
import torch
import transformers

from lowbit.errors import DataError
from lowbit.sources import check_tokenizer, read_text, token_ids, token_windows
from tests.sources import tiny_models as tiny

LINES = "".join(f"line {i} of many\n" for i in range(101))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(LINES)
    return path


def test_file_folder_jsonl_and_parquet(tmp_path, file):
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert read_text(str(file)) == LINES
    (tmp_path / "b.md").write_text("# last, no newline at the end")
    (tmp_path / "c.bin").write_bytes(b"\0\1")
    assert read_text(str(tmp_path)) == LINES + "# last, no newline at the end\n"
    rows = [{"text": "one", "n": 1}, {"text": "two\n", "n": 2}, {"text": "", "n": 3}]
    (tmp_path / "r.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert read_text(str(tmp_path / "r.jsonl")) == "one\ntwo\n"
    (tmp_path / "pq").mkdir()
    pq.write_table(pa.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "pq" / "r.parquet")
    for spec in (tmp_path / "pq", tmp_path / "pq" / "r.parquet"):
        assert read_text(str(spec)) == "one\ntwo\n"
        with pytest.raises(DataError, match=r"has no column 'body'; it has text, n\. Name one with --column"):
            read_text(str(spec), column="body")
        with pytest.raises(DataError, match="holds int, not text"):
            read_text(str(spec), column="n")
    with pytest.raises(DataError, match="has no column 'body'; it has text, n"):
        read_text(str(tmp_path / "r.jsonl"), column="body")


@pytest.mark.parametrize("cut", [0.5, 10, 33.3, 50, 98])
def test_parts_meet_at_a_line_without_overlap(file, cut):
    a, b = read_text(f"{file}[:{cut}%]"), read_text(f"{file}[{cut}%:]")
    assert a + b == LINES and a.endswith("\n")
    assert abs(len(a) - len(LINES) * cut / 100) <= 20
    assert read_text(f"{file}[0%:100%]") == read_text(f"{file}[:]") == LINES


def test_limit_and_line_ends(tmp_path, file):
    assert read_text(str(file), limit_chars=7) == "line 0 "
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert read_text(str(tmp_path / "dos.txt")) == "a\nb\n"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("e.txt", b"", "holds no text"),
        ("s.txt", b" \n \n", "holds no text"),
        ("z.txt", b"a\0b", "is binary"),
        ("l.txt", b"caf\xe9", r"not UTF-8 \(byte 3\); convert it"),
        ("j.jsonl", b"{]", "line 1 is not JSON"),
        ("k.jsonl", b"[1]", "line 1 is no JSON object"),
        ("p.parquet", b"PAR1 nothing", "not a whole Parquet file"),
    ],
)
def test_unusable_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_text(str(tmp_path / name))


def test_unusable_specs(tmp_path, file):
    for spec, message in [
        ("absent.txt", "no such file or folder"),
        (f"{file}[60%:40%]", "must run upwards"),
        (f"{file}[50:60%]", r"a part is written \[a%:b%\]"),
        (f"{file}[0%:120%]", "within 0% to 100%"),
        (f"{file}[99.9%:]", "selects nothing"),
        ("datasets:nobody/nothing:test", r"cannot be loaded as a dataset \(split 'test'"),
        ("nothing-of-this-name", "cannot be loaded as a dataset"),
    ]:
        with pytest.raises(DataError, match=message):
            read_text(spec)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no .txt, .md"):
        read_text(str(tmp_path / "empty"))


def test_datasets_by_name(monkeypatch):
    import datasets

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        if config is None:
            raise FileNotFoundError(name)
        return datasets.Dataset.from_dict({"text": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_text("datasets:wikitext/wikitext-2-raw-v1:test[:50%]") == "one\n"
    assert asked[-1] == ("wikitext", "wikitext-2-raw-v1", "test")
    assert read_text("datasets:Salesforce/wikitext/raw") == "one\ntwo\n"
    assert asked[-1] == ("Salesforce/wikitext", "raw", "train")
    with pytest.raises(DataError, match="has no column 'body'; it has text"):
        read_text("datasets:a/b/c", column="body")


# ------------------------------------------------------------ windows

TEXT = " ".join(f"w{3 + i % 61}" for i in range(1000))


def test_windows_are_seeded_pieces_of_the_text_that_never_overlap():
    tokenizer = tiny.tokenizer()
    ids = token_ids(TEXT, tokenizer)
    assert ids.tolist() == [3 + i % 61 for i in range(1000)]
    got = token_windows(torch_text(ids), tokenizer, 24, 37, seed=5)
    again = token_windows(torch_text(ids), tokenizer, 24, 37, seed=5)
    other = token_windows(torch_text(ids), tokenizer, 24, 37, seed=6)
    assert got.ids.shape == (24, 37) and got.ids.dtype == torch.int64 and got.tokens_total == 1000 and not got.note
    assert torch.equal(got.ids, again.ids) and not torch.equal(got.ids, other.ids)


def torch_text(ids: torch.Tensor) -> str:
    return " ".join(f"w{i}" for i in ids.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_starts_are_apart(seed):
    words = 2000
    tokenizer = tiny.tokenizer(words)
    text = " ".join(f"w{i}" for i in range(3, words))
    ids = token_windows(text, tokenizer, 7, 64, seed).ids
    assert torch.equal(ids, ids[:, :1] + torch.arange(64))  # consecutive tokens
    assert (ids[1:, 0] - ids[:-1, 0] >= 64).all()  # in order, disjoint


def test_the_exact_fit_and_one_token_less():
    tokenizer = tiny.tokenizer()
    assert token_windows("w3 w4 w5 w6", tokenizer, 1, 4).ids.tolist() == [[3, 4, 5, 6]]
    with pytest.raises(DataError, match=r"has 4 tokens, fewer than one window of 5; .* --context 4 or less"):
        token_windows("w3 w4 w5 w6", tokenizer, 1, 5)
    with pytest.raises(DataError, match="give another text"):
        token_windows(" ", tokenizer, 1, 5)
    with pytest.raises(DataError, match="must be at least 1"):
        token_windows("w3", tokenizer, 0, 5)


def test_fewer_windows_than_asked_are_said():
    got = token_windows(TEXT, tiny.tokenizer(), 100, 64)
    assert got.ids.shape == (15, 64)
    assert got.note == "the text has 1000 tokens: 15 windows of 64, not 100; give more text for more"


def test_long_texts_do_not_warn():
    tokenizer = tiny.tokenizer()
    ids = token_ids("w3 " * 300_000, tokenizer)
    assert len(ids) == 300_000 > tokenizer.model_max_length
    assert not any("length" in key for key in tokenizer.deprecation_warnings)  # what transformers has warned of
    tokenizer("w3 " * 100)
    assert any("length" in key for key in tokenizer.deprecation_warnings)


def test_a_strangers_tokenizer():
    config = tiny.CONFIGS["llama"]()
    check_tokenizer(tiny.tokenizer(), config)
    check_tokenizer(tiny.tokenizer(40), config)  # padding rows are usual
    with pytest.raises(DataError, match=r"ids up to 64, but the model's vocabulary ends at 63: .*--tokenizer FOLDER"):
        check_tokenizer(tiny.tokenizer(65), config)


def test_tokens_added_beyond_the_models_rows_are_usual():
    """A [PAD] that never got a row; <|endoftext|>, which transformers adds to a GGUF that has none."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    assert max(tokenizer.get_vocab().values()) == tiny.VOCAB
    check_tokenizer(tokenizer, tiny.CONFIGS["llama"]())
    with pytest.raises(DataError, match="ids up to 63"):
        check_tokenizer(tokenizer, transformers.LlamaConfig(vocab_size=60))
