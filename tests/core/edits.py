"""Recipes for the toy models, applied; what tests of edited models share."""

from core.toys import Net, session

from surgery_core import ModelRecipe

GATE = {"operation": "gate", "select": "layers.*.up"}
SHIFT = {"operation": "shift", "select": "layers.{1..}.down"}
RECIPE = {
    "rules": [{"operation": "shift", "select": "head"}],
    "adapters": {"wide": GATE, "narrow": {**GATE, "select": "layers.0.up"}, "shift": SHIFT},
    "active": "wide",
}


def recipe(**changes):
    """Return the recipe with some of its keys changed; None takes one away."""
    values = {**RECIPE, **changes}
    return ModelRecipe.model_validate({k: v for k, v in values.items() if v is not None})


def planned(model=None, **changes):
    """Return the recipe's plan for a model."""
    return session().plan_recipe(Net().eval() if model is None else model, recipe(**changes))


def edited(model=None, **changes):
    """Return a model with the recipe applied."""
    return planned(model, **changes).apply()
