"""Smaller weights: which tensor becomes which block type, and the run that makes it so.

What is never quantised: norms and other vectors, the router and the correction bias. They are a
thousandth of the weights and decide what the rest does.
"""

from earnest.quantize.recipe import RECIPES, Recipe, recipe
from earnest.quantize.run import quantize
from earnest.quantize.synthetic import synth_gguf, synth_packed

__all__ = ["RECIPES", "Recipe", "quantize", "recipe", "synth_gguf", "synth_packed"]
