"""Merging modules into one: entry by entry, by singular vectors, or in bases that they share.

`merge.merge` is the one entry; the methods are plain functions of one projection at one layer.
"""
