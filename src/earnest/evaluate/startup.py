"""`--model earnest` for the `lm_eval` command, as far as it does not find it by itself.

lm_eval looks for models of other packages by entry point (group `lm_eval.models`) in the releases
after 0.4.13. For those before, the file `earnest_lm_eval.pth` beside the installed package imports
this module, only in processes whose command is `lm_eval`. In your own program, call `register`.
"""

from __future__ import annotations

from contextlib import suppress

NAME, TARGET = "earnest", "earnest.evaluate.harness:EarnestLM"


def register() -> None:
    """Have `lm_eval` know the model by its name. It is imported when it is asked for.

    Raises:
        ImportError: lm_eval is not installed.
    """
    import lm_eval.models  # noqa: F401 - registers its own, which only then are looked up
    from lm_eval.api import registry

    finds_by_itself = hasattr(registry, "load_plugins")
    if not finds_by_itself and NAME not in registry.model_registry:
        registry.model_registry.register(NAME, target=TARGET)


with suppress(ImportError, AttributeError):  # an lm_eval without a registry like this: not for us
    register()
