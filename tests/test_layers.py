"""The house keeps its shape: imports go upward only, llama.cpp is touched in one place, the public names are known."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from child import run_child

import llama_sessions
from llama_sessions.llama import REQUIRED

ROOT = Path(llama_sessions.__file__).parent

# Each line may import from the lines above it, and within a line from the left. docs/design says why in this order.
LAYERS = """
errors types notice options generation_options
report messages window spoken session
kv kv.row kv.slots
kv.policy kv.node kv.leaves kv.radix kv.arena kv.blobs kv.blob_store kv.cache kv.segments
kv.costs kv.plan kv.sequences kv.eviction kv.alignment
memo marks spans stretches stops json_scan reply_format call_reader reply_parser writing tokenizing render
gbnf_rules gbnf_text gbnf_readings gbnf json_schema
llama llama.log llama.memory llama.batch llama.deep_stack llama.vocab llama.template llama.grammar llama.schema
llama.model llama.sampler llama.snapshot llama.context
kv.store kv.holes kv.prefix kv.snapshot
reply speech thinking
loading hooks prompts layout seats parking pending planner evicting preparing stepper integrity overview entry
house steps manager course generation stream tool_loop stateless pace pool_stats ticket batching pool
async_pool together engine
testing
__init__
demo terminal info __main__
"""
ORDER = LAYERS.split()
PURE = [name for name in ORDER if ORDER.index(name) < ORDER.index("llama") or name.startswith("kv.")]


def module_names() -> list[str]:
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(ROOT.rglob("*.py"))]


def source_of(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from runtime_nodes(node)


def imports_of(module: str, source: str) -> tuple[set[str], set[str]]:
    """Modules of the package that a module imports, and top-level names from outside; by what is written in it."""
    inside, outside = set(), set()
    package = module.split(".")[:-1]
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] + (node.module or "").split(".")
            named = [".".join([*filter(None, base), alias.name]) for alias in node.names]
            whole = ".".join(filter(None, base)) or "__init__"
            inside |= {name if source_of(name).exists() or (ROOT / name).is_dir() else whole for name in named}
    return inside, outside


@pytest.mark.parametrize("module", module_names())
def test_imports_go_upward_only(module: str) -> None:
    name = module.removesuffix(".__init__")
    assert name in ORDER, f"{name} has no place yet: put it into LAYERS, where its imports allow"
    inside, _ = imports_of(module, source_of(module).read_text())
    down = [other for other in inside if other != name and ORDER.index(other) >= ORDER.index(name)]
    assert not down, f"{name} imports {', '.join(down)}, which stand below it"


@pytest.mark.parametrize("module", module_names())
def test_only_the_llama_folder_imports_llama_cpp(module: str) -> None:
    _, outside = imports_of(module, source_of(module).read_text())
    assert module.startswith("llama.") or not outside & {"llama_cpp", "jinja2", "ctypes"}


@pytest.mark.parametrize("module", [m for m in module_names() if m.removesuffix(".__init__") in PURE])
def test_pure_modules_import_numpy_at_most(module: str) -> None:
    _, outside = imports_of(module, source_of(module).read_text())
    assert outside <= {"numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("module", "source", "inside"),
    [
        ("kv.plan", "from .row import Row", {"kv.row"}),
        ("kv.plan", "from ..types import Message", {"types"}),
        ("entry", "from .llama import log", {"llama.log"}),
        ("llama.model", "from . import log", {"llama.log"}),
        ("manager", "def f():\n    from .engine import Engine", {"engine"}),
        ("demo", "from . import ContextManager", {"__init__"}),
        ("report", "if TYPE_CHECKING:\n    from .session import Session", set()),
    ],
)
def test_the_import_reader_finds_what_is_written(module: str, source: str, inside: set[str]) -> None:
    assert imports_of(module, source) == (inside, set())


def used_of_llama_cpp(source: str) -> set[str]:
    """What a module reads of llama_cpp, and the fields that it sets of llama.cpp's parameters."""
    used, params = set(), {}
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="llama_cpp"), attr=name):
                used.add(name)
            case ast.ImportFrom(module=str(module), names=names) if module.startswith("llama_cpp."):
                used |= {f"{module.removeprefix('llama_cpp.')}.{alias.name}" for alias in names}
            case ast.Assign(targets=[ast.Name(id=variable)], value=ast.Call(func=ast.Attribute(attr=made))):
                params[variable] = made.replace("_default_params", "_params") if "_default_params" in made else ""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id=variable), attr=field, ctx=ast.Store()) if params.get(variable):
                used.add(f"{params[variable]}.{field}")
    return used


def test_every_symbol_of_llama_cpp_that_is_used_is_checked_at_import() -> None:
    used = set().union(*(used_of_llama_cpp(path.read_text()) for path in (ROOT / "llama").glob("*.py")))
    assert {"llama_decode", "llama_context_params.kv_unified", "llama_grammar.SchemaConverter"} <= used
    assert used - {"llama_grammar", "llama_chat_format"} == set(REQUIRED)


@pytest.mark.parametrize("name", ["llama_decode", "llama_context_params.kv_unified", "llama_grammar.SchemaConverter"])
def test_a_llama_cpp_python_that_lacks_a_symbol_is_a_clear_error_at_import(name: str) -> None:
    said = run_child(
        """
        import sys
        import llama_cpp

        *path, last = sys.argv[1].split(".")
        thing = llama_cpp
        for part in path:
            thing = getattr(thing, part)
        delattr(thing, last)
        try:
            import llama_sessions
        except ImportError as e:
            print(e)
        """,
        name,
    )
    assert f"lacks {name}; llama-sessions needs another one: pip install 'llama-cpp-python>=0.3.36,<0.4'" in said


PUBLIC = [
    "AsyncPool", "Branch", "Cancelled", "Capabilities", "CapacityError", "Chunk", "ContextManager", "ContextOverflow",
    "DecodeError", "Engine", "Eviction", "LlamaSessionsError", "MemoryKind", "ModelError", "NativeError", "NextToken",
    "NoFreeSlot", "OptionError", "PRESETS", "Pending", "Piece", "Pool", "PoolStats", "Prefix", "PrepareReport",
    "Preview", "PromptChunk", "QueueFull", "RadixCache", "RadixOptions", "RadixStats", "Reply", "STRATEGIES", "Session",
    "Slots", "SnapshotError", "StateError", "Stats", "StepReport", "StepResult", "Stream", "Stretch", "TemplateError",
    "Ticket", "TokenLogprob", "ToolCallDelta", "Usage", "builtin_model",
]  # fmt: skip


def test_the_public_names_are_exactly_these() -> None:
    assert sorted(llama_sessions.__all__) == PUBLIC
    assert len(set(llama_sessions.__all__)) == len(llama_sessions.__all__)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in ("PRESETS", "STRATEGIES")])  # dicts
def test_a_public_name_has_a_docstring_of_its_own(name: str) -> None:
    # Not inspect.getdoc, which would take a base class's; and a dataclass without one gets its signature.
    doc = getattr(llama_sessions, name).__doc__
    assert doc
    assert not doc.startswith(f"{name}(")
    assert inspect.cleandoc(doc)[0].isupper() or doc.startswith("`")


def test_importing_the_package_leaves_llama_cpps_log_alone() -> None:
    printed = run_child(
        """
        import ctypes
        import llama_cpp

        def installed():
            callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
            llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
            return ctypes.cast(callback, ctypes.c_void_p).value

        before = installed()
        import llama_sessions
        from llama_sessions.llama import log
        after = installed()
        log.install()
        print(before == after, before == installed())
        """
    )
    assert printed.split() == ["True", "False"]


def test_importing_the_package_configures_no_logging() -> None:
    printed = run_child(
        """
        import logging
        import llama_sessions
        print(len(logging.getLogger().handlers), logging.getLogger("llama_sessions").level)
        """
    )
    assert printed.split() == ["0", "0"]
