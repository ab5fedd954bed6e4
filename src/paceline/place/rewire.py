"""An optimizer that was made before its parameters were split goes on with what this rank holds of them.

Torch's own ``fully_shard`` leaves such an optimizer with parameters that no gradient reaches any more: training stops, and nothing
says so. Here every split parameter takes its predecessor's place in its group, and state that was there is split the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer


def rewire(
    optimizer: Optimizer,
    change: Mapping[nn.Parameter, nn.Parameter | None],
    split: Callable[[nn.Parameter, Tensor], Tensor] = lambda p, whole: whole,
) -> None:
    """Put other parameters in the place of those that were split.

    The optimizer keeps its identity, its groups and their settings, its hooks and schedules.

    Args:
        optimizer: The script's.
        change: By parameter what stands in its place; None: this rank holds nothing of it. Others stay.
        split: Cuts a tensor of the optimizer's state, of the shape of the whole parameter, as the new parameter is cut.
    """
    for group in optimizer.param_groups:
        group["params"] = [new for old in group["params"] if (new := change.get(old, old)) is not None]
    for old, new in change.items():
        if new is old or old not in optimizer.state:
            continue
        state = optimizer.state.pop(old)
        if new is not None:
            optimizer.state[new] = {key: _cut(value, old, new, split) for key, value in state.items()}


def _cut(value: object, old: Tensor, new: nn.Parameter, split: Callable[[nn.Parameter, Tensor], Tensor]) -> object:
    return split(new, value) if isinstance(value, Tensor) and value.shape == old.shape and value.dim() else value
