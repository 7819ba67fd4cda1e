"""Training a part of the model, for cards where all of it does not fit: LoRA, or the last layers only.

LoRA keeps each matrix W of the blocks fixed and learns a product of two thin matrices beside it: W + α/r·B·A. Frozen
parameters need neither gradient nor optimizer state. Checkpoints always hold the merged, plain model.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanochat.gpt import GPT
from nanochat.ops.linear import linear

ALPHA_PER_RANK = 2.0  # α/r: how strongly B·A counts, the same for every rank


class LoRALinear(nn.Module):
    """A linear layer whose weight is fixed, with a learned product of rank r beside it; B begins as zero."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.product_dtype: torch.dtype | None = None  # see GPT.set_product_dtype
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)  # (out, in)
        device, dtype = linear.weight.device, linear.weight.dtype
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=device, dtype=dtype))  # (r, in)
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device, dtype=dtype))  # (out, r)
        nn.init.normal_(self.lora_a, std=linear.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)."""
        dtype = self.product_dtype
        thin = linear(linear(x, self.lora_a, dtype), self.lora_b, dtype)
        return linear(x, self.weight, dtype) + thin * ALPHA_PER_RANK

    def merged(self) -> Tensor:
        """The one matrix that does the same."""
        return self.weight.detach() + ALPHA_PER_RANK * (self.lora_b.detach() @ self.lora_a.detach())


def add_lora(model: GPT, rank: int) -> None:
    """Fix the whole model and put a LoRA of this rank beside every matrix of its blocks that is larger than that."""
    linears = [
        (module, name, child)
        for module in model.blocks.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear) and rank < min(child.weight.shape)
    ]
    if rank < 1 or not linears:
        raise ValueError(f"--lora_rank={rank}: it must be at least 1, and smaller than the matrices of the blocks")
    model.requires_grad_(False)
    for module, name, child in linears:
        setattr(module, name, LoRALinear(child, rank))


def train_last_layers(model: GPT, count: int) -> None:
    """Fix everything but the last `count` blocks and lm_head."""
    if not 1 <= count <= model.config.n_layer:
        raise ValueError(f"--last_layers={count}: the model has {model.config.n_layer} layers")
    model.requires_grad_(False)
    for block in model.blocks[-count:]:
        block.requires_grad_(True)
    model.lm_head.requires_grad_(True)


def lora_tensors(model: GPT) -> dict[str, Tensor]:
    """The learned thin matrices by name."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("lora_a", "lora_b")}


def merged_weights(model: GPT) -> dict[str, Tensor]:
    """The weights of the plain model that does the same (those of a model without LoRA as they are)."""
    weights = {name: p.detach() for name, p in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            weights[f"{name}.weight"] = module.merged()
    return weights


@torch.no_grad()
def load_lora(model: GPT, tensors: dict[str, Tensor]) -> None:
    """Put back what `lora_tensors` gave."""
    for name, p in lora_tensors(model).items():
        p.copy_(tensors[name])


def lora_groups(model: GPT, lr: float) -> list[dict[str, Any]]:
    """One AdamW group of all thin matrices."""
    tensors = lora_tensors(model)
    group = {"kind": "adamw", "params": list(tensors.values()), "names": list(tensors), "lr": lr}
    return [{**group, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}]


def trainable_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizer groups without the fixed parameters."""
    kept = []
    for group in groups:
        pairs = [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if p.requires_grad]
        if pairs:
            kept.append({**group, "names": [n for n, _ in pairs], "params": [p for _, p in pairs]})
    return kept
