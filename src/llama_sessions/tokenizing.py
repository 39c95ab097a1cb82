"""Stretches to token ids: each tokenised once and kept, replies with the ids they were sampled as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .marks import Marker
from .memo import Memo
from .spoken import SpokenReply
from .stretches import NO_TOKENS, Region, TextStretch
from .types import TokenArray, Vocab


def n_common(a: str, b: str) -> int:
    """Characters that two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


_KEPT = 16 * 2**20  # characters of stretches, and of replies, whose tokens are remembered
_Spelled: TypeAlias = tuple[TokenArray, list[int]]


def weigh_reply(reply: SpokenReply) -> int:
    """Characters that remembering a reply counts for."""
    return len(reply.text) + 64


class StretchTokenizer:
    """One vocabulary, and what it made of the stretches seen so far."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._tokens: Memo[str, TokenArray] = Memo(_KEPT, lambda text: len(text) + 64)
        self._says_control: Memo[SpokenReply, bool] = Memo(_KEPT, weigh_reply)
        self._spelled: Memo[SpokenReply, _Spelled | None] = Memo(_KEPT, weigh_reply)

    def tokens(self, stretch: TextStretch, replies: Sequence[SpokenReply | None]) -> tuple[TokenArray, set[int]]:
        """Ids of a stretch, and the messages that kept their own in it."""
        text = stretch.text
        if not text:
            return NO_TOKENS, set()
        cuts: list[tuple[int, int, TokenArray]] = []
        kept = set()
        for region in stretch.regions:
            reply = replies[region.index] if region.index < len(replies) else None
            if reply is not None and reply.ids:
                cut = self._standing(region, text, reply, cuts[-1][1] if cuts else 0)
                if cut is not None:
                    cuts.append(cut)
                    kept.add(region.index)
        if cuts:
            pieces: list[TokenArray] = []
            at = 0
            for a, b, ids in [*cuts, (len(text), len(text), None)]:
                fresh = self._fresh_tokens(text, at, a)
                if fresh is None:
                    break
                pieces.append(fresh)
                if ids is not None:
                    pieces.append(ids)
                at = b
            else:
                return np.concatenate(pieces), kept
        return self._tokenize(text), set()

    def _fresh_tokens(self, text: str, a: int, b: int) -> TokenArray | None:
        """Ids for `text[a:b]` as it stands behind `text[:a]`; None where no token border falls on `a`."""
        if a == b:
            return NO_TOKENS
        if a == 0 or not self._vocab.adds_space_prefix:
            return self._tokenize(text[a:b])
        # An SPM vocabulary puts a space before every text it is given: take the ids out of the longer text instead.
        tokens = self._tokenize(text[:b])
        begins = self._begins(text[:b].encode(), tokens)
        first, target = int(np.searchsorted(begins, len(text[:a].encode()))), len(text[:a].encode())
        return tokens[first:] if first < len(tokens) and begins[first] == target else None

    def _begins(self, data: bytes, tokens: TokenArray) -> npt.NDArray[np.int64]:
        """For each token of a text the byte that it begins at."""
        pieces = [self._vocab.piece(int(token)) for token in tokens]
        if not self._vocab.adds_space_prefix:
            return np.cumsum([0, *map(len, pieces)])[:-1]
        begins = np.empty(len(pieces), np.int64)
        at = 0
        for i, piece in enumerate(pieces):
            begins[i] = at
            # Before text, and behind a user-defined token in it, stands a space that is not in the text.
            not_there = piece[:1] == b" " and not data.startswith(piece, at)
            at += len(piece) - not_there
        return begins

    def _tokenize(self, text: str) -> TokenArray:
        tokens = self._tokens.get(text)
        if tokens is None:
            tokens = self._tokens.keep(text, self._vocab.tokenize(text))
        return tokens

    def _standing(self, region: Region, text: str, reply: SpokenReply, low: int) -> tuple[int, int, TokenArray] | None:
        """Where in the stretch, from `low` on, a reply stands with its own ids: whole, or what the template left."""
        spelled = self._spell(reply)
        if spelled is None:
            return None
        ids, borders = spelled
        content = reply.text
        # Beyond its end: literal marks stand for characters of the content, and are longer.
        places = ((region.a, region.start), (region.b, region.end))
        anchors = [(at, min(c, len(content))) for at, c in places if c is not None]
        a = anchors[0][0] - anchors[0][1]
        if a >= low and text.startswith(content, a):
            return a, a + len(content), ids
        best: tuple[int, int, TokenArray] | None = None
        for at, c in anchors:
            if at < low:
                continue
            back = n_common(text[low:at][::-1], content[:c][::-1])
            ahead = n_common(text[at : at + len(content)], content[c:])
            # What is left of a token that was cut through belongs to the template's text.
            within = [k for k, border in enumerate(borders) if c - back <= border <= c + ahead]
            if within and within[0] < within[-1]:
                i, j = within[0], within[-1]
                found = at + borders[i] - c, at + borders[j] - c, ids[i:j]
                if best is None or found[1] - found[0] > best[1] - best[0]:
                    best = found
        return best

    def _spell(self, reply: SpokenReply) -> tuple[TokenArray, list[int]] | None:
        """A reply's ids, and the character that each token border falls on (-1: within one); None if they do not
        spell its text."""
        if reply in self._spelled:
            return self._spelled.get(reply)
        ids = list(reply.ids)
        if max(ids, default=0) >= self._vocab.n_tokens:  # a saved session may say anything
            return self._spelled.keep(reply, None)
        while ids and self._vocab.is_eog(ids[-1]):
            ids.pop()
        pieces = [self._vocab.piece(t) for t in ids]
        data = b"".join(pieces)
        if not ids or data != reply.text.encode():
            return self._spelled.keep(reply, None)
        borders, at, n_chars = [0], 0, 0
        for piece in pieces:
            n_chars += sum(byte & 0xC0 != 0x80 for byte in piece)
            at += len(piece)
            whole = at == len(data) or data[at] & 0xC0 != 0x80
            borders.append(n_chars if whole else -1)
        return self._spelled.keep(reply, (np.array(ids, np.int32), borders))

    def token_at(self, stretch: TextStretch, chars: Sequence[int]) -> list[int]:
        """For each character of the stretch, the index in the prompt of the first token that begins at or after it."""
        begins = self._begins(stretch.text.encode(), stretch.tokens)
        targets = [len(stretch.text[:char].encode()) for char in chars]
        return [stretch.n_tokens_before + int(at) for at in np.searchsorted(begins, targets)]

    def says_control(self, reply: SpokenReply, marker: Marker) -> bool:
        """Whether there is special-token text in a reply, and all of it was sampled as those tokens."""
        says = self._says_control.get(reply)
        if says is None:
            found = list(marker.scan.finditer(reply.text))
            spelled = self._spell(reply) if found else None
            says = False
            if spelled is not None:
                ids, borders = spelled
                at = dict(zip(borders, ids.tolist(), strict=False))
                says = all(m.lastgroup is None and at.get(m.start()) == marker.control[m[0]] for m in found)
            self._says_control.keep(reply, says)
        return says
