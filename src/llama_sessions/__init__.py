"""Many chat sessions over one llama.cpp context, in your own process.

from llama_sessions import ContextManager, Engine, Session

with ContextManager.load("model.gguf", max_sessions=8) as cm:
    cm.set_system("You are concise.")
    chat = Session()
    print(Engine(cm).chat(chat, "What is a KV cache?").text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .errors import (
    Cancelled,
    CapacityError,
    ContextOverflow,
    DecodeError,
    LlamaSessionsError,
    ModelError,
    NativeError,
    NoFreeSlot,
    OptionError,
    QueueFull,
    SnapshotError,
    StateError,
    TemplateError,
)
from .generation_options import PRESETS
from .kv.prefix import Prefix
from .kv.slots import Slots
from .manager import ContextManager
from .options import RadixOptions
from .pending import NextToken, Pending, PromptChunk
from .reply import Branch, Chunk, Reply, TokenLogprob
from .report import PrepareReport, Preview, RadixStats, Stats, StepReport, StepResult, Stretch
from .session import Session
from .stream import Stream
from .types import Capabilities, MemoryKind

if TYPE_CHECKING:
    from .async_pool import AsyncPool
    from .call_reader import ToolCallDelta
    from .kv.cache import RadixCache
    from .kv.eviction import STRATEGIES, Eviction, Piece
    from .kv.policy import Usage
    from .pool import Pool
    from .pool_stats import PoolStats
    from .ticket import Ticket

__all__ = [
    "PRESETS",
    "STRATEGIES",
    "AsyncPool",
    "Branch",
    "Cancelled",
    "Capabilities",
    "CapacityError",
    "Chunk",
    "ContextManager",
    "ContextOverflow",
    "DecodeError",
    "Engine",
    "Eviction",
    "LlamaSessionsError",
    "MemoryKind",
    "ModelError",
    "NativeError",
    "NextToken",
    "NoFreeSlot",
    "OptionError",
    "Pending",
    "Piece",
    "Pool",
    "PoolStats",
    "Prefix",
    "PrepareReport",
    "Preview",
    "PromptChunk",
    "QueueFull",
    "RadixCache",
    "RadixOptions",
    "RadixStats",
    "Reply",
    "Session",
    "Slots",
    "SnapshotError",
    "StateError",
    "Stats",
    "StepReport",
    "StepResult",
    "Stream",
    "Stretch",
    "TemplateError",
    "Ticket",
    "TokenLogprob",
    "ToolCallDelta",
    "Usage",
    "builtin_model",
]


_WHEN_ASKED = {
    "AsyncPool": "async_pool",
    "Eviction": "kv.eviction",
    "Piece": "kv.eviction",
    "Pool": "pool",
    "PoolStats": "pool_stats",
    "RadixCache": "kv.cache",
    "STRATEGIES": "kv.eviction",
    "Ticket": "ticket",
    "ToolCallDelta": "call_reader",
    "Usage": "kv.policy",
}


def __getattr__(name: str) -> Any:
    """What is imported only where it is used: asyncio alone takes as long as half of the rest."""
    if name not in _WHEN_ASKED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_WHEN_ASKED[name]}", __name__), name)
    return value


def builtin_model() -> str:
    """Path of the model in the box: tiny, and it remembers what it is told."""
    from importlib.resources import files

    return str(files(__package__) / "data" / "tiny-chat.gguf")
