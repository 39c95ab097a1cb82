"""Work for `step`: prompts that are being decoded, and single tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .kv.row import Row
from .render import Rendered
from .report import PrepareReport, Stretch
from .seats import Seat
from .session import Session
from .types import Message, TokenArray


@dataclass(eq=False)
class Pending:
    """A `prepare` under way: planned and applied, not decoded yet. Void once the session is begun again.

    `tokens`: (n,) int32, what the row is to hold; `n_reused` of them were there already. `rendered`: the prompt, of
    which that is all unless something had to go: then `n_evicted` tokens, `dropped` messages. `on_return`: this is
    no prompt of the user's, but a row on its way back; called when it is there.
    """

    session: Session
    tokens: TokenArray
    rendered: Rendered
    seat: Seat
    number: int
    n_reused: int
    wants_logits: bool
    stretches: list[Stretch]
    n_evicted: int = 0
    dropped: tuple[Message, ...] = ()
    started: float = field(default_factory=time.perf_counter)
    decode_seconds: float = 0.0
    on_return: Callable[[], None] | None = None
    is_whole: bool = False  # once it is, it stays so, wherever the row goes then
    is_given_up: bool = False  # nobody will go on with it, whoever still knows it (the traceback of an error, say)

    @property
    def row(self) -> Row:
        return self.seat.row

    @property
    def is_void(self) -> bool:
        """Whether the session was begun again since."""
        return self.seat.n_begun != self.number

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_left(self) -> int:
        """Tokens still to decode."""
        return max(0, len(self.tokens) - self.row.n)

    @property
    def done(self) -> bool:
        self.is_whole = self.is_whole or (not self.is_void and self.row.n >= len(self.tokens))
        return self.is_whole and not self.is_void

    def conclude(self) -> bool:
        """Whether it is done; whoever has to know is told."""
        if self.done:
            if self.on_return is not None:
                self.on_return()
            else:
                self.session.last_prepare = self.report()
        return self.done

    def report(self) -> PrepareReport:
        n_decoded = len(self.tokens) - self.n_reused
        stretches = list(self.stretches)
        if n_decoded:
            stretches.append(Stretch("decode", self.n_reused, len(self.tokens), self.decode_seconds))
        return PrepareReport(
            n_tokens=len(self.tokens),
            n_reused=self.n_reused,
            n_decoded=n_decoded,
            stretches=tuple(stretches),
            seconds=time.perf_counter() - self.started,
            n_evicted=self.n_evicted,
            dropped=self.dropped,
            exact=self.row.is_exact,
        )


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """The next `n_tokens` of a prompt (at most what is left of it)."""

    pending: Pending
    n_tokens: int

    @property
    def session(self) -> Session:
        return self.pending.session


@dataclass(frozen=True, slots=True)
class NextToken:
    """One token at the end of a session's row."""

    session: Session
    token: int


Work = PromptChunk | NextToken
