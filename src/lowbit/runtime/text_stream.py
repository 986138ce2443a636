"""From a stream of token ids to a stream of text: whole characters, right spaces, and an end at a stop string."""

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what tokenizers decode an unfinished UTF-8 character to


class Detokenizer:
    """Token ids to text, one at a time, holding back what does not yet end a character.

    A token's text can depend on the one before it (the space of "▁word"), so each is decoded together with the
    tokens of the last piece, and only what that adds is given out. `context` are ids before the first, whose text is
    not given out: with a plain prompt's last ids, the first piece keeps its space.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(context)
        self.known = 0  # decoded from here on
        self.given = len(self.ids)  # given out up to here

    def add(self, token: int) -> str:
        """The text that `token` completes; "" while a character is unfinished, or for special tokens."""
        self.ids.append(token)
        text = self._new_text()
        if not text or text.endswith(BROKEN):
            return ""
        self.known, self.given = self.given, len(self.ids)
        return text

    def flush(self) -> str:
        """What was held back, as far as it can be shown."""
        text = self._new_text()
        self.known, self.given = self.given, len(self.ids)
        return text

    def _new_text(self) -> str:
        before = self._decode(self.ids[self.known : self.given])
        return self._decode(self.ids[self.known :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""


class StopStrings:
    """Passes text through up to the first stop string; holds back an end that may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.found = False

    def add(self, text: str) -> str:
        self.held += text
        places = [i for i in (self.held.find(s) for s in self.stops) if i >= 0]
        if places:
            self.found, out, self.held = True, self.held[: min(places)], ""
            return out
        keep = max((self._beginning(s) for s in self.stops), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out

    def flush(self) -> str:
        out, self.held = self.held, ""
        return out

    def _beginning(self, stop: str) -> int:
        """Length of the longest end of `held` that begins `stop`."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)
