"""What comes out of a generation: chunks while it goes on, and the reply at its end."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .session import Session
from .types import FloatArray, Message

if TYPE_CHECKING:
    from .call_reader import ToolCallDelta

CUT_SHORT = ("cancelled", "timeout")  # stop reasons of a reply that somebody else ended


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's bytes and its natural log-probability under the model, before any sampler; `top`: the likeliest tokens
    in its place, best first, without alternatives of their own."""

    token: int
    piece: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """The bytes as text; half a character shows as U+FFFD."""
        return self.piece.decode("utf-8", "replace")


def logprobs_of(logits: FloatArray, token: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of `token` under (n_vocab,) float32 logits, and the `n_top` likeliest with theirs, best
    first. 0.3 ms at 152k, 2 ms with alternatives."""
    highest = float(logits.max())
    total = highest + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    n_top = min(n_top, len(logits))
    best = np.argpartition(logits, len(logits) - n_top)[len(logits) - n_top :] if n_top else np.empty(0, np.int64)
    best = best[np.argsort(-logits[best], kind="stable")]
    return float(logits[token]) - total, [(int(t), float(logits[t]) - total) for t in best]


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished reply.

    `text`: what the user is to read; `thinking`: reasoning, tags taken off; `tool_calls`: in OpenAI's form.
    `tokens`: all sampled ids without end-of-generation. `stop_reason`: "stop" (the model ended it), "length",
    "stop_string", "cancelled", "timeout", "grammar_dead_end" (no token goes on as the grammar wants it).
    `n_prompt` = `n_reused` + `n_decoded`, unless it was cancelled before its first token. `logprobs`: one a token, if
    they were asked for. Times are wall-clock seconds from the call.
    """

    text: str
    tokens: tuple[int, ...]
    stop_reason: str
    n_prompt: int
    n_reused: int
    n_decoded: int
    n_generated: int
    first_token_s: float
    total_s: float
    thinking: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts in OpenAI's words."""
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_generated,
            "total_tokens": self.n_prompt + self.n_generated,
            "prompt_tokens_details": {"cached_tokens": self.n_reused},
        }

    @property
    def finish_reason(self) -> str:
        """Why it ended, in OpenAI's words: "tool_calls", "length" or "stop"."""
        if self.tool_calls:
            return "tool_calls"
        return "stop" if self.stop_reason in ("stop", "stop_string") else "length"

    @property
    def is_cut_short(self) -> bool:
        """Whether it was cancelled, or its time was over."""
        return self.stop_reason in CUT_SHORT

    @property
    def got_nowhere(self) -> bool:
        """Whether it was cut short before its first token: then nothing was added to its session."""
        return self.is_cut_short and not self.tokens

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of its tokens: to choose between replies. NaN where none were asked for."""
        return float(np.mean([p.logprob for p in self.logprobs])) if self.logprobs else float("nan")


def reply_fields(thinking: str, tool_calls: Sequence[Mapping[str, Any]]) -> Message:
    """What a reply adds to the fields of an assistant message beside its content."""
    fields: Message = {}
    if thinking:
        fields["reasoning_content"] = thinking
    if tool_calls:
        fields["tool_calls"] = copy.deepcopy(list(tool_calls))
    return fields


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sampled token and the text it made visible (maybe none). The last one carries the `reply`.

    `kind`: "content", "thinking" or "tool_call"; of a tool call `tool_call` is what is new, in OpenAI's streaming form.
    A token whose text is of two kinds gives a chunk for each. `token` None: it went with the chunk before, or no token
    belongs to it (the end of a reply that was cancelled or timed out: what was held back until then).

    The texts of one kind put together are the reply's, and so are the calls that were not withdrawn; unless the stream
    was closed, or an error ended it: then the reply may have text that waited for what would follow.
    """

    text: str
    token: int | None
    reply: Reply | None = None
    kind: str = "content"
    tool_call: ToolCallDelta | None = None
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Branch:
    """One of several replies to the same prompt, and the session that goes on from it."""

    session: Session
    reply: Reply
