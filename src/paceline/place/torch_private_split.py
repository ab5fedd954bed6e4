"""More private parts of torch, those that splitting a model leans on. Slow to import, so ``torch_private`` does without them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import _backward
from torch.distributed.tensor import DTensor

from paceline.terms.errors import StepError


def input_half(root: Tensor, inputs: list[Tensor], weights: list[nn.Parameter]) -> Any:
    """The half of a backward that gives the gradients of `inputs`; what the other half needs is returned.

    Torch's half backwards leave out parameters whose way to the root meets nothing that depends on the inputs: those are named
    in the result, and :func:`weight_half` computes them by autograd.
    """
    edge = torch.autograd.graph.get_gradient_edge(root)
    one = torch.ones_like(root)
    _, groups = _backward.stage_backward_input([root], None, inputs, iter(weights))
    covered = {node for group in groups for node in group["params"]}
    left_out = [w for w in weights if _backward._get_grad_fn_or_grad_acc(w) not in covered]
    return edge, one, groups, left_out


def weight_half(halves: Any, weights: list[nn.Parameter]) -> None:
    """The other half: gradients of the weights are added to their ``.grad``."""
    edge, one, groups, left_out = halves
    groups = [group for group in groups if group.get("grads") is not None]
    if left_out:
        grads = torch.autograd.grad([edge], left_out, [one], retain_graph=True, allow_unused=True)
        for w, grad in zip(left_out, grads, strict=True):
            if grad is not None:
                w.grad = grad if w.grad is None else w.grad + grad
    _backward.stage_backward_weight(iter(weights), groups)


def guard_split_numbers() -> None:
    """Numbers made of split parameters are read whole, and are not mixed with a loss in silence.

    Torch's DTensor gives this rank's part of a sum when it is read (``p.norm().item()``), and where such a number is added to a loss
    fails somewhere in backward. Here reading adds the parts up, which takes all ranks, and the addition is refused. Idempotent.
    """
    dispatcher: Any = cast(Any, DTensor)._op_dispatcher
    handlers = dispatcher._custom_op_handlers
    if torch.ops.aten._local_scalar_dense.default in handlers:
        return
    handlers[torch.ops.aten._local_scalar_dense.default] = _read_whole
    replicate = dispatcher._try_replicate_spec_for_scalar_tensor

    def unless_it_learns(op: Any, plain: Tensor, mesh: Any) -> Any:
        if plain.requires_grad or plain.numel() != 1:
            raise StepError(
                "PL513", f"{op}: a parameter of a split model meets a tensor of the script outside of the model"
            )
        return replicate(op, plain, mesh)

    dispatcher._try_replicate_spec_for_scalar_tensor = unless_it_learns


def _read_whole(op: Any, args: Any, kwargs: Any) -> Any:
    return op(args[0].full_tensor(), *args[1:], **kwargs)
