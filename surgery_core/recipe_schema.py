"""The JSON Schema of recipes, for editors and for programs that write them."""

from collections.abc import Mapping
from typing import Any

from surgery_core.recipe import Recipe


def recipe_schema(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON Schema of recipes as they are written: with variables, `extends` or both.

    Args:
        options: Schemas of the options of operations, by the name of the operation.
    """
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    text = {"type": "string"}
    for name in ("RuleRecipe", "AdapterRecipe"):
        definitions[name]["properties"]["operation"] = {"enum": sorted(options)}
    definitions["ModelRecipe"]["properties"]["adapters"]["propertyNames"] = _name_schema("rules")
    schema["properties"]["models"]["propertyNames"] = _name_schema()
    for part in (schema, *definitions.values()):
        # What editors show: the first line of the docstring.
        part["description"] = part["description"].partition("\n")[0]
    schema = _with_variables(schema)
    schema["properties"] |= {
        "extends": {"anyOf": [text, {"type": "array", "items": text, "minItems": 1}]},
        "variables": {"type": "object", "additionalProperties": {"type": _SCALARS}},
    }
    del schema["required"]
    schema["anyOf"] = [{"required": ["models"]}, {"required": ["extends"]}]
    for name in ("RuleRecipe", "AdapterRecipe"):
        schema["$defs"][name]["allOf"] = [
            {
                "if": {
                    "properties": {"operation": {"const": operation}},
                    "required": ["operation"],
                },
                "then": {"properties": {"options": _with_variables(found)}},
            }
            for operation, found in sorted(options.items())
        ]
    # Of an adapter, what was saved or a recipe below may say the rest.
    for case in schema["$defs"]["AdapterRecipe"]["allOf"]:
        case["then"]["properties"]["options"].pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


_SCALARS = ["string", "number", "boolean", "null"]


def _name_schema(*reserved: str) -> dict[str, Any]:
    excluded = {"not": {"enum": list(reserved)}} if reserved else {}
    return {"pattern": r"^[^./\\:][^/\\:]*$", **excluded}


def _with_variables(schema: Any) -> Any:  # noqa: ANN401 (plain data)
    """Return a JSON Schema that allows text with a variable wherever one allows some values only."""
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key in ("properties", "$defs", "patternProperties"):
        if key in found:
            found[key] = {name: _with_variables(part) for name, part in found[key].items()}
    for key in ("items", "additionalProperties"):
        if key in found:
            found[key] = _with_variables(found[key])
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if key in found:
            found[key] = [_with_variables(part) for part in found[key]]
    types = found.get("type", ())
    types = {types} if isinstance(types, str) else set(types)
    if not ({"enum", "const"} & found.keys() or types & {"integer", "number", "boolean"}):
        return found
    outer = {key: found.pop(key) for key in ("title", "description", "default") if key in found}
    return {**outer, "anyOf": [found, {"type": "string", "pattern": r"\$\{[^{}]+\}"}]}
