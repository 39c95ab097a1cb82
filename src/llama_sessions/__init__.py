"""Many chat sessions over one llama.cpp context, in your own process.

from llama_sessions import ContextManager, Engine, Session

with ContextManager.load("model.gguf", max_sessions=8) as cm:
    cm.set_system("You are concise.")
    chat = Session()
    print(Engine(cm).chat(chat, "What is a KV cache?").text)
"""

from .call_reader import ToolCallDelta
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

__all__ = [
    "PRESETS",
    "Branch",
    "Cancelled",
    "Capabilities",
    "CapacityError",
    "Chunk",
    "ContextManager",
    "ContextOverflow",
    "DecodeError",
    "Engine",
    "LlamaSessionsError",
    "MemoryKind",
    "ModelError",
    "NativeError",
    "NextToken",
    "NoFreeSlot",
    "OptionError",
    "Pending",
    "Prefix",
    "PrepareReport",
    "Preview",
    "PromptChunk",
    "QueueFull",
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
    "TokenLogprob",
    "ToolCallDelta",
    "builtin_model",
]


def builtin_model() -> str:
    """Path of the model in the box: tiny, and it remembers what it is told."""
    from importlib.resources import files

    return str(files(__package__) / "data" / "tiny-chat.gguf")
