"""How the thinking of a reply comes to its end: by the model, by a budget, or because a grammar is owed behind it."""

from __future__ import annotations

from collections import deque

from .speech import Speech
from .types import Constraint, Vocab


class Thinking:
    """Says which tokens have to come, and which may not, while a reply thinks.

    The closing tag is forced once the budget is used up. Where a grammar is owed behind the thinking, it is forced too
    in place of a token that would pass the grammar by: the end of generation, or one that goes on behind the tag.
    """

    def __init__(self, vocab: Vocab, speech: Speech, closing: str, budget: int | None, n_tokens: int = 0) -> None:
        """`n_tokens`: as many were thought already."""
        self._vocab = vocab
        self._speech = speech
        self._closing = closing
        self._budget = budget
        self._n_tokens = n_tokens
        self._left: deque[int] | None = None  # of the tag that is forced; None: none was begun

    def forced(self, rule: Constraint | None) -> int | None:
        """The token that has to come next, if one has to. `rule`: what it must obey; no tag is forced against it."""
        if self._budget is not None and self._speech.is_thinking:
            if self._n_tokens >= self._budget:
                self._close()
            self._n_tokens += 1
        if self._left and rule is not None and not rule.allows(self._left[0]):
            self._left = None  # perhaps later
        return self._left.popleft() if self._left else None

    def instead_of(self, token: int) -> int:
        """What comes in place of a token that was drawn inside a thinking, where a grammar is owed behind it."""
        if self._vocab.is_eog(token) or self._speech.said_behind(self._vocab.piece(token)):
            self._close()
            return self._left.popleft() if self._left else token
        return token

    def _close(self) -> None:
        """Once: a tag whose tokens do not close the thinking will not do so the second time."""
        if self._left is None:
            self._left = deque(self._closing_ids())

    def _closing_ids(self) -> list[int]:
        """The tag, or what is left of it where the model has begun to spell it."""
        whole, begun = self._spelled(self._closing), self._speech.n_closed
        if len(whole) == 1 or not begun:  # nobody spells a tag that is a token
            return whole
        rest = self._closing[begun:]
        ids = self._spelled(rest)
        # Some vocabularies put a space before any text.
        return ids if b"".join(map(self._vocab.piece, ids)) == rest.encode() else whole

    def _spelled(self, text: str) -> list[int]:
        ids: list[int] = self._vocab.tokenize(text, special=True).tolist()
        return ids
