"""What a reply has to decode, step by step: its prompt, then token by token; and the prompt again, where its row had to
go, or its window to begin anew."""

from __future__ import annotations

from .errors import CapacityError, ContextOverflow, SnapshotError, StateError
from .kv.row import Row
from .manager import ContextManager
from .pending import NextToken, Pending, PromptChunk, Work
from .session import Session


class Course:
    """The way of one reply through the context. It decodes nothing itself: `work` says what comes next.

    `tokens`: what was said so far; all of it but the last token is in the row.
    """

    def __init__(self, cm: ContextManager, session: Session, holder: object | None, *, continues: bool) -> None:
        """`holder`: who holds the session meanwhile; None: this. `continues`: the prompt ends within a message."""
        self.session = session
        self.tokens: list[int] = []
        self._cm = cm
        self._holder = holder
        self._continues = continues
        self._pending: Pending | None = None
        self._renewal: Pending | None = None  # of a reply that had to go on in a new window, or in another row
        self._row: Row | None = None
        self._n_prompt = 0  # tokens of the row before the reply; below 0 where a part of the reply had to go
        self._n_at_way = -1  # tokens there were when it last gave way
        self._most = cm.capabilities.n_row_max

    @property
    def is_under_way(self) -> bool:
        """Whether a token was chosen already, and nothing has to be decoded before the next but that."""
        return bool(self.tokens) and (self._renewal is None or self._renewal.done)

    @property
    def pending(self) -> Pending | None:
        """The prompt under way, or None before `start` and once it is decoded."""
        if self._renewal is not None and not self._renewal.done:
            return self._renewal
        if self.tokens or self._pending is None or self._pending.done:
            return None
        return self._pending

    @property
    def holder(self) -> object:
        """Who holds the session and may step it."""
        return self if self._holder is None else self._holder  # not kept: it would be a cycle

    def begin_prompt(self) -> None:
        """Plan the prompt; again, where there is more to share by now."""
        begun = self._cm.begin(self.session, holder=self.holder, continue_last=self._continues)
        self._take_prompt(begun)

    def _take_prompt(self, begun: Pending) -> None:
        self._pending, self._row, self._n_prompt = begun, begun.row, begun.n_tokens

    @property
    def n_generated(self) -> int:
        """Tokens said so far."""
        return len(self.tokens)

    def give_up_row(self) -> None:
        """Let the row go for others; `come_back` gets it again, token for token."""
        self._cm.park(self.session, holder=self.holder)

    def come_back(self) -> None:
        """Begin to get the row again. CapacityError where there is no room for it yet."""
        if not self.tokens:
            self.begin_prompt()
            return
        renewal = self._renewal
        if renewal is not None and not renewal.done and len(self._cm.tokens(self.session)) < renewal.n_tokens:
            self.begin_again()  # it gave way before its row was what it was to be, and that is all that was kept
            return
        self._renewal = self._cm.begin_return(self.session, holder=self.holder) or self._renewal
        if self._renewal is not None:
            self._row = self._renewal.row

    def begin_again(self) -> None:
        """After a decode that failed in the middle: the row is to be what it was to become, with fresh logits."""
        if not self.tokens:
            self.begin_prompt()
            return
        row, tokens = self._row, self.tokens
        if row is None or row.n < self._n_prompt + len(tokens) - 1:  # it lost more than what failed
            self._renewal = self._cm.begin(
                self.session, holder=self.holder, continue_last=self._continues, reply=tokens
            )
            self._n_prompt = self._renewal.n_tokens - len(tokens)
        else:
            wanted = [*row.tokens.tolist(), *tokens[row.n - self._n_prompt :]]
            self._renewal = self._cm.begin_again(self.session, wanted, holder=self.holder)
        self._row = self._renewal.row

    def work(self, n_tokens: int) -> Work | None:
        """What to decode before the next chunk, at most `n_tokens`; None: logits are ready."""
        tokens, row = self.tokens, self._row
        if self._renewal is not None and not self._renewal.done:
            return PromptChunk(self._renewal, n_tokens)
        if not tokens or row is None:
            pending = self.begun()
            return None if pending.done else PromptChunk(pending, n_tokens)
        n_decoded = row.n - self._n_prompt
        return NextToken(self.session, tokens[n_decoded]) if n_decoded < len(tokens) else None

    def begun(self) -> Pending:
        """The prompt, begun; StateError before that."""
        if self._pending is None:
            raise StateError("the generation was not started")
        return self._pending

    def leave_prompt(self) -> None:
        """Nothing more of it is to be decoded: a row with half a prompt may make way for others."""
        for pending in (self._pending, self._renewal):
            if pending is not None:
                pending.is_given_up = True

    def has_room(self) -> bool:
        """Whether the row can take a token more, room made for it if need be."""
        row, most = self._row, self._most
        if row is None or most is None or (row.n < most and not row.offset):
            return True
        return self._cm.n_room(self.session) > 0 or self.makes_room()

    def gives_way(self) -> bool:
        """Whether something of the session's past could go, as cells have run out.

        A quarter of what it has, and not as much as it could do without: of several that come to the end of the cells
        in turn none is to be left with nothing. What others hold as well frees no cell, so this may be asked again.
        """
        n, row = len(self.tokens), self._row
        if not n or row is None:
            return False
        n_needed = max(1, row.n // 4)
        if self._cuts(n_needed):
            return True
        again, self._n_at_way = self._n_at_way == n, n
        # Anew it takes cells of its own for what it shared, so it may have to be shorter still.
        return not again and any(self._begins_anew(row.n - gone) for gone in (n_needed, row.n // 2, row.n))

    def makes_room(self) -> bool:
        """Whether something of the session's past could go: out of the row, or else in a window that begins anew, with
        the reply so far in it. Many tokens at once, as that is dear."""
        most = self._most or 0
        n_needed = max(1, min(self._cm.headroom, most // 8) or most // 8)
        return self._cuts(n_needed) or self._begins_anew(most - n_needed)

    def _cuts(self, n_needed: int) -> bool:
        try:
            n_gone = self._cm.make_room(self.session, n_needed, holder=self.holder)
        except SnapshotError:  # the row was lost on the way: it begins anew
            return False
        self._n_prompt -= n_gone
        return n_gone > 0

    def _begins_anew(self, n_most: int) -> bool:
        """Whether the reply so far could go on behind a new prompt, both together not longer than `n_most`."""
        tokens, n_free = self.tokens, (self._most or 0) - n_most
        try:
            begun = self._cm.begin(
                self.session, holder=self.holder, continue_last=self._continues, reply=tokens, n_free=n_free
            )
        except (ContextOverflow, CapacityError):
            return False
        if not tokens:
            self._take_prompt(begun)
            return True
        self._renewal, self._row = begun, begun.row
        self._n_prompt = begun.n_tokens - len(tokens)
        return True
