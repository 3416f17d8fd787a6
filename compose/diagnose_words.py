"""A diagnosis in words: a sentence for each thing that its numbers say."""

from collections.abc import Sequence

import numpy as np

from compose.diagnose import Diagnosis, Routed, balance, by_layer, prototype_pairs

MANY = 8  # modules of a result that have a sentence each


def words(found: Diagnosis) -> list[str]:
    """What the numbers say, a sentence each: first of every result, then of all together."""
    told = []
    for name in found.results:
        told += _made(found, name) + _sizes(found, name) + _artefacts(found, name)
        told += _first_draws(found, name)
    told += _prototypes(found)
    return told + [_routing(name, routed) for name, routed in found.routing.items()]


def _made(found: Diagnosis, name: str) -> list[str]:
    """How a step of a recipe is made; of an expression that is known."""
    result = found.results[name]
    if result.made_by == found.composition:
        return []
    return [f"{name} is {result.made_by}, in {result.space} space."]


def _inputs(found: Diagnosis, name: str) -> list[str]:
    """The modules of the inputs that a result rests on."""
    return [module for given in found.results[name].inputs for module in found.modules[given]]


def _sizes(found: Diagnosis, name: str) -> list[str]:
    """How large a result's modules are, what they are most like, and their effective ranks."""
    modules = found.modules[name]
    largest = max(_inputs(found, name), key=lambda n: found.norms[n])
    size = found.norms[largest]
    if not size:
        return [f"Every input of {name} adds nothing."]
    if len(modules) <= MANY:
        return [_size(found, module, largest, _inputs(found, name)) for module in modules]
    times = _range([found.norms[module] / size for module in modules], "{:.2f}")
    ranks = _range([found.effective_ranks[module] for module in modules], "{:.2f}")
    return [
        f"The {len(modules)} modules of {name} are {times} times as large as {largest}, the "
        f"largest input, and of effective rank {ranks}."
    ]


def _size(found: Diagnosis, module: str, largest: str, inputs: Sequence[str]) -> str:
    """How large a module is next to the largest input, and which input it is most like."""
    order = {name: n for n, name in enumerate(found.norms)}
    row = found.cosines[order[module]]
    best = max(inputs, key=lambda n: abs(row[order[n]]))
    return (
        f"{module} is {found.norms[module] / found.norms[largest]:.2f} times as large as "
        f"{largest}, the largest input, and most like {best}, at a cosine of "
        f"{row[order[best]]:+.2f}; its effective rank is {found.effective_ranks[module]:.2f}, "
        f"that of {best} {found.effective_ranks[best]:.2f}."
    )


def _artefacts(found: Diagnosis, name: str) -> list[str]:
    """What of a result comes of no input alone, and how far the other space's lies."""
    told, space = [], found.results[name].space
    modules = found.modules[name]
    subject = name if len(modules) == 1 else f"each of {name}'s modules"
    shares = [found.interaction[m] for m in modules if m in found.interaction]
    if shares and max(shares) > 0.01:
        told.append(f"{_range(shares)} of {subject} comes of no input alone: {_why(space)}.")
    gaps = [found.gap[m] for m in modules if m in found.gap]
    if gaps and max(gaps) > 0.01:
        other = "factor" if space == "delta" else "delta"
        told.append(
            f"Wholly in {other} space {subject} would differ by {_range(gaps)} of the exact one's "
            f"size."
        )
    return told


def _why(space: str) -> str:
    cross = "cross terms, each module's a with another's b, which delta space does not have"
    if space == "factor":
        return cross
    if space != "delta":
        return f"of steps in factor space {cross}; of others what methods make of all modules"
    return "the method weighs modules against each other, entry by entry or direction by direction"


def _first_draws(found: Diagnosis, name: str) -> list[str]:
    """What composition did to the share of the a's that is their initialisation."""
    before = [found.initial[n] for n in _inputs(found, name) if n in found.initial]
    after = [found.initial[n] for n in found.modules[name] if n in found.initial]
    if not before or not after:
        return []
    was, is_now = float(np.mean(before)), float(np.mean(after))
    text = f"Of the inputs' a's {was:.0%} is their first draw; of {name}'s {is_now:.0%}."
    if was - is_now > 0.2 and "factor" in found.results[name].space:
        text += " Taking that away is not taking knowledge away: compare with untrained()."
    return [text]


def _prototypes(found: Diagnosis) -> list[str]:
    """How well Arrow can tell a library's modules apart, before and after."""
    if not found.prototypes.any():
        return []
    told = []
    for library, pairs in prototype_pairs(found).items():
        made = library in found.results
        now = [(pair.after if made else pair.before) or 0.0 for pair in pairs]
        was = [pair.before for pair in pairs if made and pair.before is not None]
        text = f"The prototypes of {library}'s modules have a mean cosine of {np.mean(now):.2f}"
        if len(was) == len(now):
            text += f", against {np.mean(was):.2f} before"
        if len(now) > 1:
            one, other = pairs[int(np.argmax(now))].modules
            text += f"; the most alike are {one} and {other}, at {max(now):.2f}"
        told.append(text + ".")
    return told


def _routing(name: str, routed: Routed) -> str:
    """How evenly a text is routed: token by token, and over all of it."""
    count = len(routed.modules)
    shares = [np.atleast_2d(found["share"]) for found in routed.projections.values()]
    mean_share = np.mean(np.concatenate(shares), axis=0)
    order = np.argsort(-mean_share, kind="stable")[:MANY]
    taken = ", ".join(f"{routed.modules[n]} {mean_share[n]:.0%}" for n in order)
    entropy = by_layer(routed)
    text = f"Every token reads one module in {name}, so that no token's weights have any entropy"
    if routed.top_k > 1:
        share = entropy.mean() / np.log(routed.top_k)
        least, most = entropy.argmin(), entropy.argmax()
        text = (
            f"The weights of a token in {name} have a mean entropy of {entropy.mean():.2f} nats, "
            f"{share:.0%} of the most that there can be, log {routed.top_k}: least in layer "
            f"{least} ({entropy[least]:.2f}), most in layer {most} ({entropy[most]:.2f})"
        )
    mean = balance(routed)
    return (
        f"{text}; those of all tokens together have {mean.mean():.2f} of log {count} = "
        f"{np.log(count):.2f}: {taken}."
    )


def _range(values: Sequence[float], form: str = "{:.0%}") -> str:
    """One value, or the least and the largest."""
    least, most = form.format(min(values)), form.format(max(values))
    return least if least == most else f"{least} to {most}"
