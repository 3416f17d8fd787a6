"""The merging methods that work on singular vectors and subspaces, by name.

Each takes a LoRA with the axis M of the modules in front, at one layer of one projection, weights
(M,) and its own options, and gives the merged LoRA from the factors: no (I, O) matrix is formed.
"""

from collections.abc import Callable

import jax

from compose.merging.singular import iso_c, iso_cts, tsv
from compose.merging.subspaces import compress_then_merge, core_space, knots
from compose.merging.svc import svc, svc_vector
from compose.merging.unlearning import ext_sub, ext_sub_vector
from compose.merging.wudi import wudi
from lora_jax.modules import LoRA

SPECTRAL: dict[str, Callable[..., LoRA]] = {
    "knots": knots,
    "core_space": core_space,
    "compress_then_merge": compress_then_merge,
    "tsv": tsv,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "wudi": wudi,
    "svc": svc,
    "ext_sub": ext_sub,
}

# What the same names do to IA3 offsets (M, F), where the paper says; the others refuse IA3.
VECTORS: dict[str, Callable[..., jax.Array]] = {"svc": svc_vector, "ext_sub": ext_sub_vector}
