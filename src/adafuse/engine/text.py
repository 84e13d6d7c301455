"""text: a sequence's text as its tokens come, never half a character, up to a stop string."""

from __future__ import annotations

AS_TEXT = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
HALF = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of bytes that are no character (yet)


class TextStream:
    """Pieces of the text of a sequence. They join to `text`, which ends before the first stop string.

    stop: strings; what could be the beginning of one is held back. min_tokens: one that is complete with so many tokens or fewer is text.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = (), min_tokens: int = 0):
        self.text, self.stopped = "", False
        self._tokenizer, self._stop, self._min_tokens = tokenizer, stop, min_tokens
        self._ids, self._start, self._read = [], 0, 0
        self._held = ""

    def push(self, token: int) -> str:
        """The piece that a token makes certain; may be empty. `stopped` says whether a stop string is complete."""
        self._ids.append(token)
        return self._emit(self._decoded())

    def finish(self) -> str:
        """What was held back: no more tokens come."""
        if self.stopped:
            return ""
        piece = self._emit(self._decoded(last=True))
        held, self._held = ("" if self.stopped else self._held), ""
        self.text += held
        return piece + held

    def _decoded(self, last=False) -> str:
        """The text of the tokens that were not read yet; none while it ends within a character.

        They are decoded behind those of the piece before, so that spaces are those of the whole text.
        """
        known = self._tokenizer.decode(self._ids[self._start : self._read], **AS_TEXT)
        now = self._tokenizer.decode(self._ids[self._start :], **AS_TEXT)
        if not last and (now.endswith(HALF) or len(now) <= len(known)):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(known) :]

    def _emit(self, new) -> str:
        whole, counts = self._held + new, len(self._ids) > self._min_tokens
        if counts and (found := [place for string in self._stop if (place := whole.find(string)) >= 0]):
            self.stopped, self._held = True, ""
            piece = whole[: min(found)]
        else:
            held = max((_beginning(whole, string) for string in self._stop), default=0)
            piece, self._held = whole[: len(whole) - held], whole[len(whole) - held :]
        self.text += piece
        return piece


def _beginning(text: str, string: str) -> int:
    """How many characters at the end of `text` are a beginning of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
