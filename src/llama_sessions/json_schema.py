"""A JSON Schema, checked and made plain for llama-cpp-python's converter, which ignores or misreads much of it.

What comes out uses only what that converter enforces; what could not be kept is listed. Every error names its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias
from urllib.parse import unquote

from .errors import OptionError

Schema: TypeAlias = dict[str, Any]

ANYTHING: Schema = {"type": "value"}  # a rule of the converter's; no type of JSON Schema
MAX_LENGTH = 2000  # llama.cpp's limit of repeats
_MAX_NESTING = 100
_TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
_PYTHON_TYPES: dict[str, Any] = {
    "string": str, "number": (int, float), "boolean": bool, "null": type(None), "array": list, "object": dict
}  # fmt: skip
_FORMATS = frozenset(["date", "time", "date-time", "uuid", "uuid1", "uuid2", "uuid3", "uuid4", "uuid5"])
_OF_STRINGS = frozenset(["pattern", "format", "minLength", "maxLength"])
_OF_NUMBERS = frozenset(["multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"])
_OF_ARRAYS = frozenset(
    ["items", "prefixItems", "additionalItems", "maxItems", "minItems", "uniqueItems", "contains", "minContains"]
) | {"maxContains", "unevaluatedItems"}
_OF_OBJECTS = frozenset(
    ["properties", "required", "additionalProperties", "patternProperties", "propertyNames", "maxProperties"]
) | {"minProperties", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties"}
_OF_ANY = frozenset(["type", "enum", "const", "allOf", "anyOf", "oneOf", "not", "if", "then", "else"]) | {
    "$ref",
    "$dynamicRef",
    "$recursiveRef",
}
_OF_ONE_TYPE = _OF_STRINGS | _OF_NUMBERS | _OF_ARRAYS | _OF_OBJECTS
_CONSTRAINTS = _OF_ANY | _OF_ONE_TYPE
_KEYWORDS = {
    "string": _OF_STRINGS,
    "number": _OF_NUMBERS,
    "integer": _OF_NUMBERS,
    "array": _OF_ARRAYS,
    "object": _OF_OBJECTS,
}


@dataclass(frozen=True, slots=True)
class PlainSchema:
    """`root` and the `definitions` that its `$ref`s name. `ignored`: `keyword at place`, for what is not enforced."""

    root: Schema
    definitions: dict[str, Schema]
    ignored: tuple[str, ...]


def schema_text(schema: Mapping[str, Any] | str) -> str:
    """A schema as JSON, as text: the same schema has the same text. Raises OptionError for what is none."""
    try:
        if not isinstance(schema, str):
            return json.dumps(schema if isinstance(schema, dict) else dict(schema), allow_nan=False)
        return json.dumps(json.loads(schema), allow_nan=False)
    except RecursionError:
        raise OptionError("json_schema: nested too deep; use $defs and $ref") from None
    except (TypeError, ValueError) as e:
        raise OptionError(f"json_schema: is not JSON: {e}") from None


def plain_schema(text: str) -> PlainSchema:
    """What a schema asks for, as far as a grammar can hold it. Raises OptionError that names the place."""
    root = json.loads(text)
    if not isinstance(root, dict):
        raise OptionError(f"json_schema: must be an object, not {text[:40]}")
    return _Walk(root).all()


@dataclass(slots=True)
class _Walk:
    root: Schema
    names: dict[tuple[str, ...], str] = field(default_factory=dict)  # of what is referred to
    waiting: list[tuple[str, Any, str]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    prefix: str = "def"  # of the names of what is referred to

    def all(self) -> PlainSchema:
        text = json.dumps(self.root)
        while f'"{self.prefix}' in text:
            self.prefix += "f"
        # An empty schema is any JSON; at the root the converter makes it an object, as llama-cpp-python's JSON mode.
        root = self.visit(self.root, "#") if _CONSTRAINTS & self.root.keys() else {}
        definitions: dict[str, Schema] = {}
        while self.waiting:
            name, schema, place = self.waiting.pop()
            definitions[name] = self.visit(schema, place)
        for pointer, name in self.names.items():
            seen = set()
            while "$ref" in definitions[name]:
                if name in seen:
                    self.fail("/".join(("#", *pointer)), "the $ref leads back to itself")
                seen.add(name)
                name = definitions[name]["$ref"]
        return PlainSchema(root, definitions, tuple(dict.fromkeys(self.ignored)))

    def fail(self, place: str, what: str) -> NoReturn:
        raise OptionError(f"json_schema: {place}: {what}")

    def ignore(self, schema: Schema, place: str, enforced: str) -> None:
        self.ignored += [f"{key} at {place}" for key in schema if key in _CONSTRAINTS and key not in enforced.split()]

    def visit(self, schema: Any, place: str, depth: int = 0) -> Schema:
        """The plain form of one schema."""
        if depth > _MAX_NESTING:
            self.fail(place, f"nested deeper than {_MAX_NESTING}; use $defs and $ref")
        if schema is True:
            return ANYTHING
        if schema is False:
            self.fail(place, "false: nothing meets it")
        if not isinstance(schema, dict):
            self.fail(place, f"a schema must be an object, not {json.dumps(schema)[:40]}")
        depth += 1
        given = _CONSTRAINTS & schema.keys()
        if "$ref" in given:
            self.ignore(schema, place, "$ref")
            return {"$ref": self.refer(schema["$ref"], place)}
        kind = self.checked_type(schema, place)
        for key in ("oneOf", "anyOf"):
            if key in given:
                self.ignore(schema, place, "anyOf")  # one of several is no more than any of them to a grammar
                branches = [(i, branch) for i, branch in self.listed(schema, key, place) if branch is not False]
                if not branches:
                    self.fail(f"{place}/{key}", "false in every branch: nothing meets it")
                return {"anyOf": [self.visit(branch, f"{place}/{key}/{i}", depth) for i, branch in branches]}
        if "const" in given:
            self.ignore(schema, place, "const type")
            return {"const": self.of_kind([schema["const"]], kind, f"{place}/const")[0]}
        if "enum" in given:
            self.ignore(schema, place, "enum type")
            values = [value for _, value in self.listed(schema, "enum", place)]
            return {"enum": self.of_kind(values, kind, f"{place}/enum")}
        if isinstance(kind, list):
            return {"anyOf": [self.visit(_of_type(schema, one), place, depth) for one in kind]}
        if "allOf" in given and kind in (None, "object"):
            return self.all_of(schema, place, depth)
        if kind == "object" or (kind is None and given & {"properties", "additionalProperties", "required"}):
            return self.object(schema, place, depth)
        if kind == "array" or (kind is None and given & {"items", "prefixItems", "minItems", "maxItems"}):
            return self.array(schema, place, depth)
        if kind == "string" or (kind is None and given & _OF_STRINGS):
            return self.string(schema, place)
        self.ignore(schema, place, "type")
        return {"type": kind} if kind else ANYTHING

    def checked_type(self, schema: Schema, place: str) -> str | list[str] | None:
        kind = schema.get("type")
        kinds = kind if isinstance(kind, list) else [kind] if "type" in schema else []
        for one in kinds:
            if one not in _TYPES:
                self.fail(f"{place}/type", f"{json.dumps(one)[:40]} is none of {', '.join(_TYPES)}")
        if kind == []:
            self.fail(f"{place}/type", "an empty list: nothing meets it")
        return kind

    def of_kind(self, values: list[Any], kind: str | list[str] | None, place: str) -> list[Any]:
        """Those of some values that a type (or one of several) allows."""
        kinds = [kind] if isinstance(kind, str) else kind
        allowed = [value for value in values if kinds is None or any(_is_a(value, one) for one in kinds)]
        if not allowed:
            self.fail(place, f"no value of the type {json.dumps(kind)}: nothing meets it")
        return allowed

    def listed(self, schema: Schema, key: str, place: str) -> list[tuple[int, Any]]:
        """The items of a list that must have some, numbered."""
        items = schema[key]
        if not isinstance(items, list) or not items:
            self.fail(f"{place}/{key}", f"must be a list with something in it, not {json.dumps(items)[:40]}")
        return list(enumerate(items))

    def number(self, schema: Schema, key: str, place: str) -> int | None:
        value = schema.get(key)
        if key not in schema:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
            self.fail(f"{place}/{key}", f"must be a whole number from 0, not {json.dumps(value)[:40]}")
        return int(value)

    def span(self, schema: Schema, low_key: str, high_key: str, place: str) -> tuple[int, int | None]:
        """Two bounds that fit together, within what a grammar can hold."""
        low, high = self.number(schema, low_key, place) or 0, self.number(schema, high_key, place)
        if high is not None and high < low:
            self.fail(place, f"{low_key} {low} is above {high_key} {high}: nothing meets it")
        if low > MAX_LENGTH:
            self.fail(f"{place}/{low_key}", f"{low} is above {MAX_LENGTH}, llama.cpp's limit of repeats")
        if high is not None and high > MAX_LENGTH:
            self.ignored.append(f"{high_key} above {MAX_LENGTH} at {place}")
            high = None
        return low, high

    # -- references

    def find(self, ref: Any, place: str) -> tuple[tuple[str, ...], Any]:
        """Where a reference leads, and what is there."""
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            self.fail(f"{place}/$ref", f"{json.dumps(ref)[:80]} is not within this schema ('#/...'); put it into $defs")
        pointer = tuple(unquote(part).replace("~1", "/").replace("~0", "~") for part in ref.split("/")[1:])
        target: Any = self.root
        for part in pointer:
            if isinstance(target, dict) and part in target:
                target = target[part]
            elif isinstance(target, list) and part.isdecimal() and int(part) < len(target):
                target = target[int(part)]
            else:
                self.fail(f"{place}/$ref", f"{json.dumps(ref)[:80]} leads nowhere: there is no {part!r}")
        return pointer, target

    def refer(self, ref: Any, place: str) -> str:
        """The name of a definition. No property's rule has such a name: the converter would take one for the other."""
        pointer, target = self.find(ref, place)
        if pointer not in self.names:
            self.names[pointer] = f"{self.prefix}{len(self.names)}-"
            self.waiting.append((self.names[pointer], target, "/".join(("#", *pointer))))
        return self.names[pointer]

    # -- one type each

    def all_of(self, schema: Schema, place: str, depth: int) -> Schema:
        """All parts as one object: their properties, and what any of them requires."""
        parts = [(part, f"{place}/allOf/{i}") for i, part in self.listed(schema, "allOf", place)]
        if len(parts) == 1 and not (_CONSTRAINTS & schema.keys()) - {"allOf", "type"}:
            return self.visit(*parts[0], depth)
        self.ignore(schema, place, "allOf type properties required additionalProperties")
        merged: Schema = {"type": "object", "properties": {}, "required": []}
        parts.append(({key: value for key, value in schema.items() if key != "allOf"}, place))
        for part, where in parts:
            n_followed = 0
            while isinstance(part, dict) and "$ref" in part and n_followed < _MAX_NESTING:
                _, part = self.find(part["$ref"], where)
                n_followed += 1
            properties = part.get("properties", {}) if isinstance(part, dict) else None
            if not isinstance(properties, dict) or ("properties" not in part and part is not parts[-1][0]):
                self.fail(where, "only objects with properties can be joined by allOf")
            self.ignore(part, where, "allOf type properties required additionalProperties")
            for name in properties.keys() & merged["properties"].keys():
                self.ignored.append(f"allOf at {place} (two definitions of {name!r}: the last holds)")
            merged["properties"] |= properties
            merged["required"] += part.get("required") or []
        return self.object(merged, place, depth)

    def object(self, schema: Schema, place: str, depth: int) -> Schema:
        self.ignore(schema, place, "type properties required additionalProperties allOf")
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict):
            self.fail(f"{place}/properties", "must be an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self.fail(f"{place}/required", "must be a list of names")
        more = schema.get("additionalProperties", True)
        if not properties and not required and more is True and "properties" not in schema:
            return {"type": "object"}
        never = {name for name, s in properties.items() if s is False} - set(required)
        may_be = {name: s for name, s in properties.items() if name not in never}
        plain = {name: self.visit(s, f"{place}/properties/{name}", depth) for name, s in may_be.items()}
        for name in required:
            if name not in plain and more is False:
                self.fail(f"{place}/required", f"{name!r} is no property, and others are forbidden: nothing meets it")
            if name not in plain:
                plain[name] = self.visit(more, f"{place}/additionalProperties", depth)
        if "*" in plain:
            self.fail(f"{place}/properties", "a property named '*' is what the converter takes for any other property")
        result: Schema = {"type": "object", "properties": plain, "required": required}
        if more is not False and "additionalProperties" in schema:
            result["additionalProperties"] = self.visit(more, f"{place}/additionalProperties", depth)
            if plain or never:
                self.ignored.append(f"additionalProperties at {place} (they may repeat a property's name)")
        return result

    def array(self, schema: Schema, place: str, depth: int) -> Schema:
        self.ignore(schema, place, "type items prefixItems minItems maxItems")
        low, high = self.span(schema, "minItems", "maxItems", place)
        items = schema.get("items", True)
        first, key = (items, "items") if isinstance(items, list) else (schema.get("prefixItems", []), "prefixItems")
        if not isinstance(first, list):
            self.fail(f"{place}/{key}", "must be a list")
        if first or items is False:
            if len(first) < low or (high is not None and len(first) > high):
                self.ignored.append(f"minItems and maxItems at {place} (there are always {len(first)})")
            return {"prefixItems": [self.visit(s, f"{place}/{key}/{i}", depth) for i, s in enumerate(first)]}
        if "items" not in schema and not low and high is None:
            return {"type": "array"}
        result: Schema = {"items": self.visit(items, f"{place}/items", depth), "minItems": low}
        return result if high is None else {**result, "maxItems": high}

    def string(self, schema: Schema, place: str) -> Schema:
        low, high = self.span(schema, "minLength", "maxLength", place)
        if "pattern" in schema:
            self.ignore(schema, place, "type pattern")
            if not isinstance(schema["pattern"], str):
                self.fail(f"{place}/pattern", "must be text")
            return {"type": "string", "pattern": schema["pattern"]}
        if isinstance(schema.get("format"), str) and schema["format"] in _FORMATS:
            self.ignore(schema, place, "type format")
            return {"type": "string", "format": schema["format"]}
        self.ignore(schema, place, "type minLength maxLength")
        if not low and high is None:
            return {"type": "string"}
        return (
            {"type": "string", "minLength": low}
            if high is None
            else {"type": "string", "minLength": low, "maxLength": high}
        )


def _of_type(schema: Schema, kind: str) -> Schema:
    """A schema of several types as one of them: without the keywords that say nothing about it."""
    foreign = _OF_ONE_TYPE - _KEYWORDS.get(kind, frozenset())
    return {**{key: value for key, value in schema.items() if key not in foreign}, "type": kind}


def _is_a(value: Any, kind: str) -> bool:
    """Whether a JSON value is of a type. 1.0 is an integer, true is no number."""
    if kind == "integer":
        return _is_a(value, "number") and value == int(value)
    return isinstance(value, _PYTHON_TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
