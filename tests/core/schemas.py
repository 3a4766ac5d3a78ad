"""As much of JSON Schema as the schema of recipes needs, so that no package is."""

import re

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
}
KNOWN = {
    *("$schema", "$defs", "$ref", "title", "description", "default", "type", "enum", "const"),
    *("anyOf", "oneOf", "allOf", "not", "if", "then", "minimum", "maximum", "pattern", "required"),
    *("properties", "additionalProperties", "propertyNames", "minProperties", "items", "minItems"),
}


def misfits(schema, value, root=None, place="$"):
    """Return where and why a value does not fit a JSON Schema."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return [] if schema else [f"{place}: nothing is allowed"]
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        schema = {**root["$defs"][schema["$ref"].removeprefix("#/$defs/")], **schema}
    found = [f"{place}: {what}" for is_ok, what in _checks(schema, value, root) if not is_ok]
    for part, item, where in _parts(schema, value, root):
        found += misfits(part, item, root, place + where)
    return found


def _checks(schema, value, root):
    """Yield what a value as a whole must be, and why it is not."""

    def fits(part):
        return not misfits(part, value, root)

    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        yield any(_is(value, each) for each in types), f"no {' or '.join(types)}"
    yield value in schema.get("enum", [value]), f"none of {schema.get('enum')}"
    yield value == schema.get("const", value), f"not {schema.get('const')}"
    yield any(map(fits, schema.get("anyOf", [True]))), "fits nothing"
    yield sum(map(fits, schema.get("oneOf", [True]))) == 1, "fits none or several"
    yield not fits(schema.get("not", False)), "is not allowed"
    if _is(value, "number"):
        is_within = schema.get("minimum", value) <= value <= schema.get("maximum", value)
        yield is_within, "out of range"
    if isinstance(value, str):
        yield re.search(schema.get("pattern", ""), value), "does not match"
    if isinstance(value, list):
        yield len(value) >= schema.get("minItems", 0), "too short"
    if isinstance(value, dict):
        yield len(value) >= schema.get("minProperties", 0), "too small"
        yield from ((name in value, f"no {name}") for name in schema.get("required", ()))


def _parts(schema, value, root):
    """Yield schemas for a value and its parts, and where those are."""
    yield from ((part, value, "") for part in schema.get("allOf", ()))
    if "if" in schema and not misfits(schema["if"], value, root):
        yield schema["then"], value, ""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield schema.get("items", True), item, f"[{number}]"
    if isinstance(value, dict):
        other = schema.get("additionalProperties", True)
        for name, item in value.items():
            yield schema.get("properties", {}).get(name, other), item, f".{name}"
            yield schema.get("propertyNames", True), name, f".{name}"


def _is(value, kind):
    if kind in ("number", "integer"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (kind == "number" or value == int(value))
    return isinstance(value, TYPES[kind])
