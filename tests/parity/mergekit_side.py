"""mergekit's answers, in a process of its own: its pins clash with those of everything else here.

Reads a case from a .npz file, with a method's name and numbers as JSON, and writes what mergekit
makes of it. Whatever is left to chance is not: `torch.bernoulli` gives the masks that it is told.
"""

import json
import sys

import numpy as np
import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelPath, ModelReference
from mergekit.merge_methods.generalized_task_arithmetic import GTATask
from mergekit.merge_methods.registry import REGISTERED_MERGE_METHODS
from mergekit.merge_methods.slerp import slerp
from mergekit.sparsify import RescaleNorm


def merged(case: dict[str, np.ndarray], told: dict) -> torch.Tensor:
    """The modules of a case (M, *S), as differences from a base of zeros, merged."""
    tensors = [torch.tensor(x) for x in case["tensors"]]
    if told["method"] == "slerp":
        return slerp(told["options"]["t"], *tensors)
    masks = iter(torch.tensor(x) for x in case["masks"])
    torch.bernoulli = lambda chances: next(masks).to(chances.dtype)
    method = REGISTERED_MERGE_METHODS[told["method"]]
    names = [ModelReference(model=ModelPath(path=str(n))) for n in range(len(tensors) + 1)]
    parameters = {
        name: ImmutableMap({"weight": weight, **told["options"]})
        for name, weight in zip(names[1:], told["weights"], strict=True)
    }
    task = GTATask.model_construct(
        method=method,
        tensors=None,
        base_model=names[0],
        weight_info=WeightInfo(name="w"),
        tensor_parameters=ImmutableMap(parameters),
        int8_mask=False,
        normalize=method.default_normalize,
        lambda_=1.0,
        rescale_norm=RescaleNorm.l1 if method.default_rescale else None,
    )
    return task.execute(dict(zip(names, [torch.zeros_like(tensors[0]), *tensors], strict=True)))


if __name__ == "__main__":
    source, target = sys.argv[1:]
    case = dict(np.load(source))
    np.save(target, merged(case, json.loads(str(case["told"]))).numpy())
