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
    last = len(model.encoder.blocks) + 1
    groups = {}  # (by Muon?, peak, weight decay) -> parameters
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        block = re.match(r"encoder\.blocks\.(\d+)\.", name)
        layer = last
        if block:
            layer = int(block[1]) + 1
        elif name.startswith(("encoder.patch", "encoder.cls", "encoder.pos")):
            layer = 0
        peak = recipe.lr * recipe.layer_decay ** (last - layer)
        by_muon = False
        if recipe.optimiser == "muon":
            by_muon = block is not None and p.ndim == 2  # the matrices of the blocks
            if not by_muon:
                peak *= recipe.adam_scale
        decay = recipe.weight_decay
        if p.ndim < 2 or name.endswith((".cls", ".pos")):
            decay = 0.0
        group = groups.setdefault((by_muon, peak, decay), [])
        group.append(p)
    matrices, rest = [], []
    for (by_muon, peak, decay), params in groups.items():
        table = dict(params=params, lr=peak, peak=peak, weight_decay=decay)
        if by_muon:
            matrices.append(table)
        else:
            rest.append(table)
    if recipe.optimiser == "sgd":
        # Not fused: that fails (torch 2.13) when a head gets its first gradient after step 0.
        return [torch.optim.SGD(rest, momentum=recipe.momentum)]
    adamw = torch.optim.AdamW(rest, betas=tuple(recipe.betas), fused=True)
    if recipe.optimiser == "adamw":
        return [adamw]
    return [Muon(matrices, momentum=recipe.momentum), adamw]


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
            group["lr"] = group["peak"] * share
            if not on_gradient:
                group["lr"] *= scale
            elif scale != 1.0:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(scale)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def share_of_peak(step: int, recipe) -> float:
    """The rate of a step as a share of the peak: linear warm-up, then a cosine down to final_lr."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    cosine = 1 + math.cos(math.pi * done)  # from 2 to 0
    return recipe.final_lr + (1 - recipe.final_lr) * 0.5 * cosine


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, each matrix's step made orthogonal by five Newton-Schulz iterations, so
    that all its directions learn at one rate (Jordan et al. 2024, whose coefficients these are).

    torch.optim.Muon is the same but for two things: it multiplies in bfloat16 everywhere, which
    takes a CPU without such instructions ten times as long, and matrix by matrix.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}  # matrices of one shape: a few large products instead of many small ones
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self.step_of(params, group["lr"], group["momentum"], group["weight_decay"])

    def step_of(self, params: list, lr: float, momentum: float, weight_decay: float) -> None:
        """Of P matrices (rows, columns)."""
        buffers, grads = [], []
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            buffers.append(self.state[p]["momentum"])
            grads.append(p.grad)
        grads = torch.stack(grads)  # (P, rows, columns)
        mean = torch.stack(buffers).lerp_(grads, 1 - momentum)
        torch._foreach_copy_(buffers, list(mean))
        ahead = grads.lerp_(mean, momentum)  # Nesterov
        change = orthogonal(ahead).to(params[0].dtype)
        rows, columns = params[0].shape
        rate = lr * max(1.0, rows / columns) ** 0.5
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, list(change), alpha=-rate)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """(P, rows, columns) -> matrices with the same singular vectors and values from 0.7 to 1.2."""
    fast = x.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = x.to(torch.bfloat16 if fast else torch.float32)
    tall = x.shape[1] > x.shape[2]
    if tall:  # of the two Gram matrices the smaller
        x = x.mT
    norm = x.norm(dim=(1, 2), keepdim=True)  # (P, 1, 1)
    x = x / norm.clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        quintic = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, quintic, x, beta=3.4445)
    return x.mT if tall else x
