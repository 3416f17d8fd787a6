"""The demo: every capability on a real model in a few minutes, as one HTML report."""
