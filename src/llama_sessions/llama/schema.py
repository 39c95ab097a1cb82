"""JSON Schema to GBNF, by llama-cpp-python's converter, put right where what it makes is no JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from llama_cpp.llama_grammar import INVALID_RULE_CHARS_RE, PRIMITIVE_RULES, RESERVED_NAMES, BuiltinRule, SchemaConverter

from ..errors import OptionError
from ..gbnf import check_gbnf
from ..gbnf_rules import Chars
from ..gbnf_text import read_gbnf
from ..json_schema import MAX_LENGTH, plain_schema, schema_text
from ..memo import Memo
from ..tokenizing import n_common

logger = logging.getLogger("llama_sessions")

_MANY = 100  # values of an enum that are not written side by side
_KEPT = 4 * 2**20  # characters of schemas whose grammars are remembered
_grammars: Memo[str, str] = Memo(_KEPT, len)

# What a JSON string holds as it is. The converter lets control characters through, which JSON forbids, and halves of
# surrogate pairs, which have no UTF-8 form and count as two characters of one.
_PLAIN = r'[^"\\\x00-\x1F\x7F]'
_HEX = "[0-9a-fA-F]"
_ESCAPED = rf'"\\" (["\\/bfnrt] | "u" ([0-9a-ceA-CEfF] {_HEX} | [dD] [0-7]) {_HEX} {_HEX})'
_FORBIDDEN_IN_CLASS = r'"\\\x00-\x1F\x7F'
_CLASSES = {"d": "0-9", "w": "a-zA-Z0-9_"}
_NOT_AS_IT_IS = [*range(0x20), 0x22, 0x5C]  # characters that a JSON string holds only escaped


def gbnf_of_schema(schema: Mapping[str, Any] | str) -> str:
    """The grammar of the JSON texts that meet a schema, given as a dict (left as it is) or as JSON text.

    The last ones are remembered. What a grammar cannot enforce is named in the log, once. Raises OptionError, with the
    place in the schema, for what is no schema, cannot be met, or is more than a grammar can hold.
    """
    text = schema_text(schema)
    known = _grammars.get(text)
    if known is not None:
        return known
    plain = plain_schema(text)
    converter = _Converter(plain.definitions)
    try:
        converter.visit(plain.root, "")
        grammar: str = converter.format_grammar()
    except OptionError:
        raise
    except RecursionError:
        raise OptionError("json_schema: too deep or too many optional properties in one object") from None
    except Exception as e:  # it asserts, and raises KeyError, AttributeError and what else goes wrong inside
        raise OptionError(f"json_schema: llama-cpp-python cannot convert it: {type(e).__name__}: {e}") from None
    try:
        summary = check_gbnf(grammar)
    except OptionError as e:
        raise OptionError(
            f"json_schema: llama.cpp cannot take the grammar that it makes: {e}; maxItems, optional properties and "
            "alternatives that begin alike are what makes it large"
        ) from None
    if not summary.ends:
        raise OptionError("json_schema: no finite JSON meets it: a definition always requires itself again")
    if plain.ignored:
        logger.warning("json_schema: not enforced: %s", ", ".join(plain.ignored))
    return _grammars.keep(text, grammar)


class _Converter(SchemaConverter):  # type: ignore[misc]
    """The converter, for plain schemas, whose references are resolved."""

    def __init__(self, definitions: dict[str, Any], *, raw_pattern: bool = False) -> None:
        super().__init__(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=raw_pattern)
        self._refs = definitions
        self._is_within = False

    def visit(self, schema: dict[str, Any], name: str) -> Any:
        name = name or ("unnamed" if self._is_within else "")  # a property "" would replace the root
        self._is_within = True
        own = f"{name}-" if name in RESERVED_NAMES else name or "root"
        if schema.get("type") == "string" and "minLength" in schema:
            # Its own way is a nested group for each character, of which llama.cpp takes 1000.
            high = schema.get("maxLength", "")
            char = self._add_primitive("char", PRIMITIVE_RULES["char"])
            rule = rf'"\"" {char}{{{schema["minLength"]},{high}}} "\"" space'
            return self._add_rule(own, rule)
        if len(schema.get("enum", ())) > _MANY:
            return self._add_rule(own, _one_of([json.dumps(value, ensure_ascii=False) for value in schema["enum"]]))
        return super().visit(schema, name)

    def _add_rule(self, name: str, rule: str) -> Any:
        clean = INVALID_RULE_CHARS_RE.sub("-", name)
        if clean in RESERVED_NAMES and clean != name:
            name = f"{clean}-"  # a property `date time` would replace the rule date-time
        return super()._add_rule(name, _PLAIN if name == "dot" else rule)

    def _add_primitive(self, name: str, rule: Any) -> Any:
        if rule is PRIMITIVE_RULES["char"]:
            rule = BuiltinRule(f"{_PLAIN} | {_ESCAPED}", [])
        return super()._add_primitive(name, rule)

    def _format_literal(self, literal: str) -> str:
        """A JSON text as a GBNF literal. The converter's own takes JSON's escapes for GBNF's."""
        return _gbnf_literal(json.dumps(json.loads(literal), ensure_ascii=False))

    def _visit_pattern(self, pattern: str, name: str) -> Any:
        if self._raw_pattern:
            return super()._visit_pattern(pattern, name)
        try:
            plain = _plain_pattern(pattern)
            alone = _Converter({}, raw_pattern=True)
            alone._visit_pattern(plain, "root")
            rules = read_gbnf(alone.format_grammar(), "root").rules
        except (AssertionError, IndexError, RecursionError, ValueError) as e:
            raise OptionError(f"json_schema: the pattern {pattern[:80]!r} cannot be converted: {e}") from None
        for element in (e for rule in rules for sequence in rule.alternatives for e in sequence):
            if isinstance(element, Chars):
                for code in _NOT_AS_IT_IS:
                    if any(low <= code <= high for low, high in element.ranges) != element.negated:
                        raise OptionError(
                            f"json_schema: the pattern {pattern[:80]!r} lets {chr(code)!r} through, which JSON holds "
                            "only escaped; leave it out of its classes"
                        )
        return super()._visit_pattern(plain, name)


def _gbnf_literal(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _one_of(texts: list[str]) -> str:
    """GBNF for any of some texts, what several begin with written once: llama.cpp follows all alternatives that the
    text so far allows."""
    alike: dict[str, list[str]] = {}
    for text in texts:
        alike.setdefault(text[0], []).append(text)
    alternatives = []
    for group in alike.values():
        common = group[0][: n_common(min(group), max(group))]
        rests = [text[len(common) :] for text in group if text != common]
        optional = "?" if len(rests) < len(group) else ""
        alternatives.append(_gbnf_literal(common) + (f" ({_one_of(rests)}){optional}" if rests else ""))
    return " | ".join(alternatives)


def _plain_pattern(pattern: str) -> str:
    """A pattern in the converter's dialect: its alternatives grouped, its escapes and negated classes made plain."""
    if len(pattern) < 2 or pattern[0] != "^" or pattern[-1] != "$":
        raise ValueError("it must begin with ^ and end with $")
    inner, found, in_class, depth, i = pattern[1:-1], "", False, 0, 0
    while i < len(inner):
        char, following = inner[i], inner[i + 1 : i + 2]
        i += 1
        if char == "\\":
            i += 1
            if not following or (following.isalnum() and following not in _CLASSES):
                raise ValueError(f"it has the escape \\{following}")
            code = _CLASSES.get(following) or _escaped(following)
            found += code if in_class else f"[{code}]"
            continue
        if char in "^$" and not in_class:
            raise ValueError(f"{char} stands in the middle of it")
        if char in "()" and not in_class:
            depth += 1 if char == "(" else -1
        if depth < 0:
            break
        if char in "*+?{" and not in_class:
            if char == "{":
                inside, closed, _ = inner[i:].partition("}")
                _check_quantifier(inside, closed)
                char, i = f"{{{inside}}}", i + len(inside) + 1
            i += inner.startswith("?", i)  # that a match should be short is no matter to who writes one
            if inner[i : i + 1] in ("*", "+", "?", "{"):
                raise ValueError(f"{inner[i]} stands behind a quantifier")
        elif char in '"]}' and not in_class:
            char = f"[{_escaped(char)}]"  # the converter would look at a bracket for ever
        found += char
        if char == "[" and not in_class:
            in_class = True
            if following == "^":
                found += "^" + _FORBIDDEN_IN_CLASS
                i += 1
            if inner.startswith("]", i):
                raise ValueError("it has a class that is empty, or begins with ]")
        elif char == "]":
            in_class = False
    if depth:
        raise ValueError("its parentheses do not match")
    return f"^({found})$"


def _escaped(char: str) -> str:
    """A character as a class of GBNF has it. A class stays by itself; what it escapes in its own way, the converter
    takes together with the letters before it, and a quantifier then for all of them."""
    return f"\\U{ord(char):08X}"


def _check_quantifier(inside: str, closed: str) -> None:
    """Of `{m}`, `{m,}` or `{m,n}`, which the converter writes out."""
    if not closed:
        raise ValueError("it has a { without a }")
    low, _, high = (part.strip() for part in inside.partition(","))
    bounds = [int(bound) for bound in (low, high) if bound]  # raises ValueError itself
    if not bounds or max(bounds) > MAX_LENGTH or bounds[0] > bounds[-1]:
        raise ValueError(f"{{{inside}}} is out of order, or above {MAX_LENGTH}")
