"""WUDI: the module that interferes least with every module on that module's own inputs.

Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via
Task Vectors" (2503.08099): min over τ of Σᵢ ‖(τ - τᵢ)ᵀτᵢ‖² / ‖τᵢ‖², where τᵢ stands for the inputs
of task i. Here τ is (I, O), the paper's transposed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from compose.decompositions import ratio
from compose.merging.cores import bases, columns, product
from lora_jax.modules import LoRA

Array = jax.Array


def wudi(members: LoRA, weights: Array, *, damping: float = 0.0) -> LoRA:
    """The minimum itself, of τᵢ = wᵢΔᵢ: least squares in the modules' M·R input directions.

    Cheng et al. (2503.08099); a module at weight 0 has no say in it.
    All of the objective, and the sum that the paper starts from, lies in those directions, so that
    descent ends there. Where they are independent the minimum is 0: on module i's inputs the result
    does what module i does. Nearly equal a's, as of one initialisation, make it large; `damping` ρ
    adds ρ‖τ - Σ τᵢ‖² and holds it near the sum, as the paper's few steps do. Linear in weights
    that are not 0.
    """
    left, cores, right = bases(members)
    norms = jnp.linalg.norm(cores, axis=(1, 2))[:, None, None]
    rows = ratio(cores.mT, norms) * (weights != 0)[:, None, None]
    wanted = weights[:, None, None] * rows @ cores
    system = jnp.concatenate([*rows, jnp.sqrt(damping) * jnp.eye(cores.shape[1])])
    total = jnp.sqrt(damping) * jnp.einsum("M,MKL->KL", weights, cores)
    inverse = jnp.linalg.pinv(system, rtol=10 * cores.shape[1] * jnp.finfo(system.dtype).eps)
    return product(left @ inverse @ jnp.concatenate([*wanted, total]), right, members)


def wudi_adam(
    members: LoRA | Array, weights: Array, *, steps: int = 300, rate: float = 1e-5
) -> Array:
    """The paper's way to the minimum: `steps` steps of Adam at `rate` from Σ wᵢτᵢ, entry by entry.

    Cheng et al. (2503.08099).
    A step moves every entry by about `rate` whatever its size, so the result depends on how large
    the modules are, and has no low rank. Of vectors (IA3) it is the mean, as in the released code;
    one module is left as it is.
    """
    if isinstance(members, Array) and members.ndim == 2:
        return jnp.mean(weights[:, None] * members, axis=0)
    left, taus = columns(members if isinstance(members, LoRA) else _factored(members))
    taus = weights[:, None, None] * taus
    tau = left @ jnp.sum(taus, axis=0)
    if len(taus) == 1:
        return tau
    optimizer = optax.adam(rate)
    gram = ratio(taus @ taus.mT, jnp.sum(taus**2, axis=(1, 2))[:, None, None])
    target = jnp.sum(gram @ taus, axis=0)

    def step(_: int, state: Any) -> Any:
        """One step of Adam on 2 Σᵢ τᵢτᵢᵀ(τ - τᵢ) / ‖τᵢ‖²."""
        tau, moments = state
        gradient = 2 * left @ (jnp.sum(gram, axis=0) @ (left.T @ tau) - target)
        update, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(tau, update), moments

    return jax.lax.fori_loop(0, steps, step, (tau, optimizer.init(tau)))[0]


def _factored(taus: Array) -> LoRA:
    """Matrices (M, I, O) as modules of rank min(I, O), one factor of each the identity."""
    rows, width = taus.shape[1:]
    eye = jnp.broadcast_to(jnp.eye(min(rows, width)), (len(taus), *[min(rows, width)] * 2))
    return LoRA(eye, taus) if rows <= width else LoRA(taus, eye)
