"""What depth costs: compress made-up models of more and more blocks, each in a process of its own.

    python -m lowbit.bench.depth --blocks 4 8 16 32 --method gptq --bits 3

A block's time must stay the same, and the peak of memory must not grow: the walk holds one block's weights at a time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADER = "| blocks | float, MB | s | s a block | peak, MB |\n|---|---|---|---|---|"
VOCAB, TEXT = 512, 40_000  # words of the made-up language, words of its text


def made_up(folder: Path, blocks: int, width: int) -> None:
    """A Llama with random weights and a tokenizer of words w3, w4, ..., written as a Hugging Face folder."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=8 * width // 3 // 64 * 64, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def measure(blocks: int, options: Sequence[str], width: int = 512) -> dict[str, Any]:
    """{"blocks", "nbytes_float", "seconds", "peak_memory_bytes"} of one compression from the command line.

    options: words of `lowbit compress` beside model, output and text
    """
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made_up(folder / "model", blocks, width)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(3, VOCAB, (TEXT,), generator=draw).tolist()
        (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
        words = ["compress", folder / "model", "-o", folder / "out", "--data", folder / "text.txt", *options, "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "lowbit", *map(str, words)], capture_output=True, text=True, check=True
        )
        made = json.loads(done.stdout)
        size = sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors"))
    return {"blocks": blocks, "nbytes_float": size} | {k: made[k] for k in ("seconds", "peak_memory_bytes")}


def main(arguments: "list[str] | None" = None) -> int:
    """Entry point; prints the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--width", type=int, default=512, help="of the hidden states, a multiple of 64")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", default="3")
    args = parser.parse_args(arguments)
    print(HEADER)
    for blocks in args.blocks:
        row = measure(blocks, ["--method", args.method, "--bits", args.bits, "--windows", "16"], args.width)
        cells = [f"{row['nbytes_float'] / 1e6:.0f}", f"{row['seconds']:.1f}", f"{row['seconds'] / blocks:.2f}"]
        print(f"| {blocks} | {' | '.join(cells)} | {row['peak_memory_bytes'] / 1e6:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
