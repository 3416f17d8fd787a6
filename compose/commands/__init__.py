"""The commands of `lora-compose` that measure: what their words are, by the first of them.

`arguments` has their flags, and a module of each one's name what it does; JAX comes with those.
"""
