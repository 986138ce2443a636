"""Cutting a text into windows of tokens, seeded, so that a calibration can be repeated exactly.

The whole text is tokenised once, without special tokens. With n tokens and `context` tokens a window there are
n // context places that do not overlap; a random shift s in [0, n mod context] and a random choice among the places
give the starts

    start_i = s + context * place_i,     the places sampled without replacement and kept in text order
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import DataError


@dataclass(frozen=True)
class Windows:
    """ids: (windows, context) int64; tokens_total: tokens in the text; note: what differs from the wish, or ''."""

    ids: Tensor
    tokens_total: int
    note: str = ""


FOREIGN = 0.5  # tokens a character: English and other languages a tokenizer was made for take 0.2 to 0.4


def token_windows(
    text: str, tokenizer: Any, windows: int, context: int, seed: int = 0, shorten: bool = False
) -> Windows:
    """Random windows that never overlap.

    A text with room for fewer windows than asked gives those it has room for, and `note` says so.
    shorten: a text shorter than one window is one window of all its tokens, and `note` warns.
    Raises DataError when not even one fits, naming the tokens there are and a --context that fits.
    """
    if windows < 1 or context < 1:
        raise DataError(f"windows={windows} and context={context} must be at least 1, e.g. --windows 24 --context 512.")
    ids = token_ids(text, tokenizer)
    asked = context
    if shorten and 1 < len(ids) < context:
        context = len(ids)
    room = len(ids) // context
    if room == 0:
        fix = f"give more text, or --context {len(ids)} or less" if len(ids) else "give another text"
        raise DataError(f"the text has {len(ids)} tokens, fewer than one window of {context}; {fix}.")
    generator = torch.Generator().manual_seed(seed)
    shift = int(torch.randint(len(ids) - room * context + 1, (1,), generator=generator))
    places = torch.randperm(room, generator=generator)[:windows].sort().values
    index = (shift + places * context)[:, None] + torch.arange(context)
    note = ""
    if context < asked:
        note = f"the text has {len(ids)} tokens, less than one window of {asked}: far too little to calibrate on"
    elif room < windows:
        note = f"the text has {len(ids)} tokens: {room} windows of {context}, not {windows}; give more text for more"
    return Windows(ids[index], len(ids), note)


def foreign_note(text: str, tokens: int) -> str:
    """A warning where the tokenizer needs so many tokens that it hardly knows the text's language; else ''."""
    if tokens <= FOREIGN * max(len(text), 1):
        return ""
    return (
        f"the tokenizer needs {100 * tokens / len(text):.0f} tokens for 100 characters of this text: it hardly knows "
        "its language. Calibrate on text like that which the model will read"
    )


def token_ids(text: str, tokenizer: Any) -> Tensor:
    """The text's tokens, (n,) int64, no special tokens added.

    Tokenised in one call, as perplexities are usually counted; the tokenizer's complaint about texts longer than the
    model's context is silenced (verbose=False), since no window will be.
    """
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Raise DataError when the tokenizer's words have ids the model has no embedding for: it belongs to another model.

    A model may have more rows than the tokenizer has words (padding), so only the other direction is an error. Tokens
    that were added to a vocabulary (a [PAD] without a row, or what transformers adds to a GGUF's) do not count: plain
    text does not hold them, and whoever feeds ids to a model checks those.
    """
    rows = config.get_text_config().vocab_size if hasattr(config, "get_text_config") else config.vocab_size
    added = tokenizer.get_added_vocab()
    highest = max((i for word, i in tokenizer.get_vocab().items() if word not in added), default=-1)
    if highest >= rows:
        raise DataError(
            f"the tokenizer has ids up to {highest}, but the model's vocabulary ends at {rows - 1}: they do not belong "
            "together; give the model's own with --tokenizer FOLDER."
        )
