"""A composition as a file, or the same as a Python value: inputs, named steps, outputs.

`read` and `write` are the way from YAML and back, `check` tells what is wrong before anything runs,
`plan` what every step will make, `run` makes it, and `lineage` draws how a module came to be.
"""

from compose.recipe.check import check
from compose.recipe.plan import plan
from compose.recipe.read import read_recipe
from compose.recipe.run import evaluate, run
from compose.recipe.value import Expression, Method, Recipe
from compose.recipe.write import recipe_text

__all__ = [
    "Expression",
    "Method",
    "Recipe",
    "check",
    "evaluate",
    "plan",
    "read_recipe",
    "recipe_text",
    "run",
]
