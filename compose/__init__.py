"""Pure functions from modules to modules: arithmetic, libraries, GenKnowSub, Arrow.

A module is an `Adapter` of `lora_jax.modules`. Sums live in one of two spaces, named wherever it
matters and never mixed: "delta" adds what the modules do to a kernel, exactly; "factor" adds their
tensors one by one, as the papers do.
"""
