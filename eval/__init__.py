"""Modules to numbers: likelihood scoring, perplexity, generation, statistics, results."""
