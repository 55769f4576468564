"""Optimisers: parameter groups, Muon, and the schedule of the rate."""

import math
import re

import torch

from model import CoFinetuneModel


def make_optimisers(model: CoFinetuneModel, recipe) -> list[torch.optim.Optimizer]:
    """One optimiser, or two for muon. A parameter group's `peak` is its rate at the schedule's top.

    Layers for layer_decay as in BEiT and VideoMAE: the embedding is 0, block i is i + 1, the final
    norm and all heads are depth + 1.
    """
    depth = len(model.encoder.blocks)
    groups = {}  # (matrix of a block?, peak, weight decay) -> parameters
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        block = re.match(r"encoder\.blocks\.(\d+)\.", name)
        layer = depth + 1
        if block:
            layer = int(block[1]) + 1
        elif name.startswith(("encoder.patch", "encoder.cls", "encoder.pos")):
            layer = 0
        by_muon = recipe.optimiser == "muon" and block is not None and p.ndim == 2
        decay = recipe.weight_decay
        if p.ndim < 2 or name.endswith((".cls", ".pos")):
            decay = 0.0
        peak = recipe.lr * recipe.layer_decay ** (depth + 1 - layer)
        if recipe.optimiser == "muon" and not by_muon:
            peak *= recipe.adam_scale
        groups.setdefault((by_muon, peak, decay), []).append(p)
    tables = {True: [], False: []}
    for (by_muon, peak, decay), params in groups.items():
        tables[by_muon].append(dict(params=params, lr=peak, peak=peak, weight_decay=decay))
    if recipe.optimiser == "sgd":
        # Not fused: that fails (torch 2.13) when a head gets its first gradient after step 0.
        return [torch.optim.SGD(tables[False], momentum=recipe.momentum)]
    adamw = torch.optim.AdamW(tables[False], betas=tuple(recipe.betas), fused=True)
    if recipe.optimiser == "adamw":
        return [adamw]
    return [Muon(tables[True], momentum=recipe.momentum), adamw]


def take_step(optimisers: list[torch.optim.Optimizer], share: float, scale: float) -> None:
    """Update, at `share` of the peak rates and at a task's own `scale` of them; then forget the
    gradients (None, not 0: zeros would still move idle heads).

    With SGD the scale is on the gradient, before the momentum's buffer: a task's gradient then
    moves the encoder by exactly its scale, however many steps of other tasks follow it. As a rate
    of the step it would hardly act: the buffer is mostly of the other tasks. AdamW and Muon, to
    which a gradient's size means little, have the step scaled.
    """
    for optimiser in optimisers:
        on_gradient = isinstance(optimiser, torch.optim.SGD)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * share * (1.0 if on_gradient else scale)
            grads = [p.grad for p in group["params"] if p.grad is not None]
            if on_gradient and scale != 1.0 and grads:
                torch._foreach_mul_(grads, scale)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def share_of_peak(step: int, recipe) -> float:
    """The rate of a step as a share of the peak: linear warm-up, then a cosine down to final_lr."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, each matrix's step made orthogonal by five Newton-Schulz iterations, so
    that all its directions learn at one rate (Jordan et al. 2024, whose coefficients these are).

    torch.optim.Muon is the same but for two things: it multiplies in bfloat16 everywhere, which
    takes a CPU without such instructions ten times as long, and matrix by matrix.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum"] for p in params]
                grads = torch.stack([p.grad for p in params])  # (P, rows, columns)
                slow = torch.stack(buffers).lerp_(grads, 1 - group["momentum"])
                torch._foreach_copy_(buffers, list(slow))
                change = orthogonal(grads.lerp_(slow, group["momentum"]))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    params,
                    list(change.to(params[0].dtype)),
                    alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5,
                )


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """(P, rows, columns) -> matrices with the same singular vectors and values from 0.7 to 1.2."""
    fast = x.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = x.to(torch.bfloat16 if fast else torch.float32)
    wide = x if x.shape[1] <= x.shape[2] else x.mT  # the smaller of the two Gram matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = torch.baddbmm(
            wide, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445
        )
    return wide if x.shape[1] <= x.shape[2] else wide.mT
