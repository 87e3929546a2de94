"""Linear layers, and the tag by which a parameter says that weight decay is not for it.

A module names such parameters in its class attribute `no_decay`, beside the code that makes them. The tag sits on the
module and not on the parameter because `to_empty` replaces parameters and would lose it.
"""

from __future__ import annotations

from torch import nn

NamedParameters = list[tuple[str, nn.Parameter]]


class Linear(nn.Linear):
    """x·Wᵀ + b; the bias takes no weight decay."""

    no_decay = ("bias",)


def decay_groups(module: nn.Module) -> tuple[NamedParameters, NamedParameters]:
    """(name, parameter) of all trainable parameters of `module`: those with weight decay, those without.

    Parameters of modules that carry no `no_decay` tag are in the first group.
    """
    decay: NamedParameters = []
    rest: NamedParameters = []
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(prefix, recurse=False):
            if parameter.requires_grad:
                tagged = name.rpartition(".")[2] in getattr(owner, "no_decay", ())
                (rest if tagged else decay).append((name, parameter))
    return decay, rest
