"""Routing a library in every form: settings, what tokens are compared with, changes, statistics.

`lora_jax.routing` applies what is built here; docs/routing.md has the formulas and the papers.
"""
