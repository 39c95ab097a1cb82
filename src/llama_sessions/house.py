"""A manager put together from its parts: how it is made, what it is, its hooks and system text, its end."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from .entry import Entry
from .errors import OptionError
from .evicting import Evictor
from .hooks import Hooks
from .integrity import check
from .kv.prefix import Prefix
from .kv.slots import Slots
from .kv.snapshot import Snapshots
from .kv.store import RowStore
from .llama import log
from .loading import Parts, Untemplated, adopt_parts, borrow_parts, load_parts
from .options import LoadOptions, ManagerOptions, checked_bool, checked_text
from .overview import Overview
from .parking import Parking
from .planner import check_length
from .preparing import Preparer
from .prompts import Prompter
from .render import Renderer
from .reply_format import ReplyFormat
from .report import Stats
from .seats import Seats
from .stepper import Stepper
from .types import Capabilities, Constraint

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger("llama_sessions")


class House:
    """What a manager consists of, and the door to it."""

    def __init__(self, ctx: Any, vocab: Any, *, chat_template: str | None = None, **options: Any) -> None:
        checked = ManagerOptions.build(options)
        self._start(adopt_parts(ctx, vocab, chat_template), checked)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, chat_template: str | None = None, **options: Any) -> Self:
        """Load a GGUF and make a context for `max_sessions` sessions.

        Options of the context (`LoadOptions`): `n_ctx` (the total shared by all sessions; default: the trained length,
        at most 8192), `max_sessions=8`, `n_batch=512`, `n_ubatch=512`, `n_threads`, `n_gpu_layers=-1`, `type_k`,
        `type_v` (ggml types; default f16), `flash_attn="auto"`, `swa_full=True`, `kv_unified=True` (False: a cache for
        each session, with no cells in common; faster from eight long, unrelated ones on); the rest: `ManagerOptions`.
        Raises OptionError, ModelError, TemplateError; costs the load of the weights.
        """
        return cls._made(partial(load_parts, path), chat_template, options)

    @classmethod
    def from_llama(cls, llm: Any, *, chat_template: str | None = None, **options: Any) -> Self:
        """A context of our own over the weights of a `llama_cpp.Llama`, which stays usable and is kept alive.

        Options as in `load`, but for `n_gpu_layers`: the weights are where they are. Raises OptionError, ModelError,
        TemplateError; costs a context, no second load.

        Close the manager before the `Llama`. A `llm.close()` frees the weights at once and waits for nobody: a call of
        this manager that another thread is in the middle of (a stream's `next`, a `prepare`) then reads freed memory,
        which may crash the process. So end those first. Calls that begin later, or were waiting for their turn, are a
        StateError; a stream keeps what was said.
        """
        if "n_gpu_layers" in options:
            raise OptionError("n_gpu_layers was decided when the Llama was loaded; leave it out here")
        return cls._made(partial(borrow_parts, llm), chat_template, options)

    @classmethod
    def _made(cls, make: Callable[..., Parts], chat_template: str | None, options: dict[str, Any]) -> Self:
        load, rest = LoadOptions.split(options)
        checked = ManagerOptions.build(rest)
        if chat_template is not None:
            checked_text("chat_template", chat_template)
        return cls.over(make(load, chat_template, quiet=not checked.log), **rest)

    @classmethod
    def over(cls, parts: Parts, **options: Any) -> Self:
        """A manager over ready-made parts: the door for `testing.fake_parts`, and for backends of your own."""
        self = cls.__new__(cls)
        self._start(parts, ManagerOptions.build(options))
        return self

    def _start(self, parts: Parts, options: ManagerOptions) -> None:
        caps = parts.context.capabilities
        self.options = options
        self.headroom = options.headroom_for(caps.n_ctx_seq)
        self._parts = parts
        n_reserved = min(2, caps.n_seq_max - 1)  # prefix, then scratch
        self._store = RowStore(parts.context, scratch=1 if n_reserved == 2 else None)
        self.slots = Slots(caps.n_seq_max, n_reserved)
        self.prefix = Prefix(self._store, 0 if n_reserved else None)
        self._snapshots = Snapshots(self._store, options.radix_options)
        self._seats = Seats(self._store, self.slots, self._snapshots)
        self._parking = Parking(self._store, self._seats, self.slots, self._snapshots, options.idle_park_after_s)
        self._hooks = Hooks()
        renderer = Renderer(
            parts.formatter, parts.vocab, no_think=options.no_think, system_fallback=options.system_fallback
        )
        raw = Renderer(Untemplated(), parts.vocab, trusts_all=True)
        self._prompter = Prompter(renderer, raw, self.prefix, self._hooks, caps.fingerprint)
        self._reply_format = ReplyFormat.of(getattr(parts.formatter, "text", ""))
        self._evictor = Evictor(self._store, options, self._prompter, self._hooks)
        self._preparer = Preparer(
            self._store, self._seats, self.prefix, self._prompter, self._snapshots, self._parking, self._evictor
        )
        self._stepper = Stepper(self._store, self._seats, self._parking)
        self._overview = Overview(
            self._store,
            self.slots,
            self.prefix,
            self._seats,
            self._preparer,
            self._parking,
            self._snapshots,
            options,
            self._evictor,
        )
        after = self._overview.publish if options.idle_park_after_s is None else self._sweep_and_publish
        self._entry = Entry(self._drain, after, self._free, parts.is_gone, quiet=not options.log)

    def __enter__(self) -> Self:
        self._entry.check()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- what it is

    @property
    def capabilities(self) -> Capabilities:
        return self._store.caps

    @property
    def is_closed(self) -> bool:
        return self._entry.closed

    @property
    def n_ctx_seq(self) -> int:
        """Tokens that one session can have."""
        return self._store.caps.n_ctx_seq

    @property
    def vocab(self) -> Any:
        """The vocabulary: `tokenize(text)`, `piece(token)`, `is_eog(token)`."""
        return self._parts.vocab

    @property
    def renderer(self) -> Renderer:
        """Messages to tokens, with this model's template and vocabulary."""
        return self._prompter.renderer

    @property
    def reply_format(self) -> ReplyFormat:
        """How the model marks thinking and tool calls, as far as its template tells."""
        return self._reply_format

    def grammar(self, gbnf: str) -> Constraint:
        """`gbnf` compiled for this vocabulary, for one reply. OptionError says where it is wrong. Never waits for a
        decode."""
        self._entry.check()
        log.capture.quiet = self._entry.quiet  # as the door does for whoever comes in
        return self._parts.grammar(gbnf)

    # -- hooks and the system prompt

    def set_hook(self, name: str, fn: Callable[..., Any]) -> None:
        """Set a hook, in place of an earlier one; OptionError for another name.

        `before_encode(messages, session)`: returns the messages that the template is to see, or None for these.
        `on_evict(dropped, session)`: gets what leaves the window, earlier replacements first, and returns messages that
        are to stand in its place (all it wants to keep of the earlier ones, too), or None; where there is no room for
        what it answered, that counts for the next try at the same messages. `sink_fn(session)`: returns `n_sink` for
        that session. These three may use the manager, for other sessions, too; what has to go from
        those within an `on_evict` goes without asking it again. What they raise passes through, and the row is as
        before.
        `on_progress(done, total, session)`: tokens of a prompt; may only read, and returns False to cancel.
        """
        with self._entry.gate(), self._entry.change:
            self._hooks.set(name, fn)

    def clear_hook(self, name: str) -> None:
        """Remove a hook; OptionError for an unknown name."""
        with self._entry.gate(), self._entry.change:
            self._hooks.clear(name)

    def set_system(self, text: str, *, keep_cache: bool = False) -> int:
        """Set the system text of every session that has none of its own; returns its tokens in the prefix slot.

        Decodes what differs from the last one. `""` clears it. A change clears the cache of saved KV, unless asked to
        keep it (then the old prompt goes in, too): it is found by whole runs of tokens, so it never misleads. Without
        a prefix slot the text is remembered and 0 is returned. Raises ContextOverflow and CapacityError; the old text
        then stays.
        """
        checked_text("the system text", text)
        checked_bool("keep_cache", keep_cache)
        with self._entry.gate(), self._entry.change:
            changes = (self.prefix.text or "") != text
            if changes and keep_cache and self.prefix.row is not None:
                self._snapshots.keep(self.prefix.row)
            n = self._encode_system(text)
            if changes and not keep_cache:
                self._snapshots.clear()
            return n

    def _encode_system(self, text: str) -> int:
        if not text:
            self.prefix.clear()
            return 0
        if not self.prefix.has_slot:
            return self.prefix.remember(text)
        tokens = self._prompter.renderer.stem(text)
        check_length(self._store, len(tokens), "the system prompt")
        return self.prefix.set(text, tokens, make_way=self._parking.make_way, park_one=self._parking.park_one)

    # -- looking at it

    def stats(self) -> Stats:
        """Counters; what a call under way does is counted at its end. Never waits for a decode."""
        self._entry.check()
        return self._overview.published

    def describe(self) -> str:
        """A printable map: slots, cells, a line for each row, and the cache. Never waits: the edges of a cache that
        changes at that very moment are left out."""
        self._entry.check()
        return self._overview.describe()

    def check_integrity(self) -> None:
        """Prove that rows, slots, cells and llama.cpp's own positions agree; StateError says what does not."""
        with self._entry.gate(), self._entry.change:
            self._seats.reclaim()
            for row in list(self._store.rows.values()):
                self._store.reconcile(row)
            self._store.sequences.clear_scratch()
            self._snapshots.settle()
            check(self._store, self.slots, self.prefix, self._seats.seats(), self._snapshots)

    def close(self) -> None:
        """Free what is ours: context and model of `load`. Sessions keep their messages. Again: nothing."""
        self._entry.close()

    def _drain(self) -> None:
        """At the beginning of each call: what sessions that are gone have left."""
        self._seats.drain()
        self._parking.drain()

    def _sweep_and_publish(self) -> None:
        """At the end of each call that may have changed something, where idle sessions are parked."""
        self._parking.sweep()
        self._overview.publish()

    def _free(self) -> None:
        self._parking.disown()
        self._seats.disown()
        self._parts.close()
