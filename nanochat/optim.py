"""MuonAdamW: Muon for the matrices inside the blocks, AdamW for everything else, alone or sharded over ranks.

One optimizer class, so that one gradient norm, one skip decision and one checkpoint cover all parameters. Matrices of
one shape are updated as one stack (muon.py); AdamW runs through PyTorch's fused or foreach kernels; nothing needs
torch.compile.

Over several ranks it works as ZeRO-2 does: gradients are reduce-scattered, every rank keeps the state of its own share
and updates it, then the parameters are gathered. All ranks end with bit-identical parameters, so no DDP wrapper is
needed. Left out: ZeRO-3 (parameters stay whole), and matrices split over ranks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from nanochat.hardware import with_more_memory
from nanochat.muon import MUON_DEFAULTS, MuonStack, newton_schulz_coefficients, state_dtype
from nanochat.ops.collectives import Ranks

ADAMW_DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
# Group keys that are no hyperparameters.
LABELS = {"kind", "params", "names", "initial_lr", "initial_weight_decay", "label"}
# The next two are about memory and messages, not about the result.
STACK_ELEMENTS = 2**26  # a rank's stack of matrices holds at most this many elements (256 MB in float32)
SHARD_ELEMENTS = 1024  # AdamW tensors smaller than this are replicated: a message costs more than the update


class AdamWTensors:
    """All tensors of an AdamW group; each rank owns a run of the elements of each, small tensors are replicated."""

    def __init__(self, group: dict[str, Any], params: list[Tensor], indices: list[int], ranks: Ranks) -> None:
        self.group, self.params, self.indices, self.ranks = group, params, indices, ranks
        # Not to split a small tensor costs each rank the whole update of it, but saves a gather that takes longer.
        self.sharded = [ranks.world > 1 and p.numel() >= SHARD_ELEMENTS for p in params]
        self.grads: dict[int, Tensor] = {}  # this rank's part of the averaged gradients, by position in params
        self.state: list[dict[str, Tensor]] = []

    def part(self, i: int, x: Tensor) -> Tensor:
        """This rank's part of x, a tensor of the shape of params[i]: a flat view where it is sharded, else x itself."""
        return x.view(-1)[self.ranks.own(x.numel())] if self.sharded[i] else x

    def reduce(self) -> Callable[[], None]:
        """Begin to average the gradients over the ranks; the result waits for the end."""
        # A parameter without a gradient sends zeros: the collectives need the same tensors on every rank.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        active = [i for i, p in enumerate(self.params) if p.grad is not None]
        waits: dict[int, Callable[[], Tensor]] = {}
        for i, grad in enumerate(grads):
            if self.sharded[i]:
                waits[i] = self.ranks.reduce_scatter(grad.reshape(-1))
            else:
                waits[i] = self.ranks.all_reduce_mean(grad.contiguous())
            self.params[i].grad = None  # the averaged part is all that is needed from here on

        # All messages of all buckets are under way before the first one is waited for.

        def finish() -> None:
            reduced = {i: wait() for i, wait in waits.items()}
            self.grads = {i: reduced[i] for i in active}

        return finish

    def _local_grads(self) -> dict[int, Tensor]:
        if self.ranks.world == 1:
            return {i: p.grad for i, p in enumerate(self.params) if p.grad is not None}
        return self.grads

    def own_grads(self) -> list[Tensor]:
        """For the norm: what is replicated counts on rank 0 only."""
        # The ranks' squares are added up; a tensor that all of them hold would count `world` times.
        return [grad for i, grad in self._local_grads().items() if self.sharded[i] or self.ranks.rank == 0]

    def clear(self) -> None:
        """Forget the averaged gradients."""
        self.grads = {}

    @staticmethod
    def state_shapes(p: Tensor) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a parameter's optimizer state."""
        return {"step": (), "exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}

    def init_state(self) -> None:
        """Begin with state of zeros."""
        # Whole or not at all: memory may run out on the way, and then the step is made again.
        states = []
        for i, p in enumerate(self.params):
            zeros = torch.zeros_like(self.part(i, p), dtype=state_dtype(p), memory_format=torch.contiguous_format)
            # The fused kernels read the step where the parameter lives, the others on the host.
            step = torch.zeros((), dtype=torch.float32, device=p.device if self._fused(p) else "cpu")
            states.append({"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()})
        self.state = states

    @staticmethod
    def _fused(p: Tensor) -> bool:
        # Fused: one kernel over all tensors reads and writes each number once. It scales gradients in float32 only.
        return p.device.type in ("cpu", "cuda") and p.dtype != torch.float64

    def step(self, multiplier: Tensor | float) -> None:
        """Update this rank's part, with gradients times `multiplier`."""
        if not self.state:
            self.init_state()
        grads = self._local_grads()
        for fused in (True, False):
            chosen = [i for i in grads if self._fused(self.params[i]) == fused]
            if chosen:
                self._step_tensors(chosen, [grads[i] for i in chosen], multiplier, fused)

    def _step_tensors(self, chosen: list[int], grads: list[Tensor], multiplier: Tensor | float, fused: bool) -> None:
        states = [self.state[i] for i in chosen]
        params = [self.part(i, self.params[i]) for i in chosen]
        # 16-bit parameters are updated in float32 and rounded once: near 1 a float16 can't move by less than 0.0005.
        # Where no cast is needed `to` returns the parameter itself, and the update lands in it.
        wide = [p.to(s["exp_avg"].dtype) for p, s in zip(params, states, strict=True)]
        grads = [g.to(p.dtype) for g, p in zip(grads, wide, strict=True)]
        scale = None
        if isinstance(multiplier, Tensor) or multiplier != 1.0:
            # Loss scale and clipping arrive as one factor; the fused kernel divides by its inverse as it reads the
            # gradient, so the factor costs no pass over memory.
            if fused:
                scale = torch.ones((), device=params[0].device) / multiplier  # made on the device: no host sync
            else:
                torch._foreach_mul_(grads, multiplier)
        # torch's own function, not its class: state and gradients here may be a rank's part of a tensor, not all of it.
        beta1, beta2 = self.group["betas"]
        adamw(
            wide,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            foreach=not fused,
            fused=fused,
            grad_scale=scale,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=self.group["lr"],
            weight_decay=self.group["weight_decay"],
            eps=self.group["eps"],
            maximize=False,
        )
        for p, w in zip(params, wide, strict=True):
            if p is not w:  # `wide` was a copy
                p.copy_(w)

    def share_params(self) -> Callable[[], None]:
        """Begin to gather the updated parts from all ranks; the result waits for the end."""
        # What is replicated was updated alike by all ranks, from the same averaged gradient.
        sharded = [p for i, p in enumerate(self.params) if self.sharded[i]]
        waits = [self.ranks.all_gather(p.view(-1)[self.ranks.own(p.numel())], p.numel()) for p in sharded]

        def finish() -> None:
            for p, wait in zip(sharded, waits, strict=True):
                p.view(-1).copy_(wait())

        return finish

    def _whole(self, i: int, x: Tensor) -> Tensor:
        if self.sharded[i] and x.dim() > 0:  # the count of steps is 0-dim, and the same everywhere
            return self.ranks.collect(x, self.params[i].numel()).view(self.params[i].shape)
        return x if self.ranks.world == 1 else x.to("cpu", copy=True)

    def export_state(self) -> dict[int, dict[str, Tensor]]:
        """The state of all tensors, by index in the optimizer; all ranks take part."""
        return {
            self.indices[i]: {key: self._whole(i, value) for key, value in state.items()}
            for i, state in enumerate(self.state)
        }

    def export_own_state(self) -> dict[int, dict[str, Tensor]]:
        """This rank's part: of a sharded tensor its run of elements, what is replicated on rank 0 only."""
        return {
            self.indices[i]: {
                key: value
                for key, value in state.items()
                if self.ranks.rank == 0 or (self.sharded[i] and value.dim() > 0)
            }
            for i, state in enumerate(self.state)
        }

    def import_state(self, states: dict[int, dict[str, Tensor]]) -> None:
        """Take this rank's part of an exported state."""
        self.init_state()
        for i, state in enumerate(self.state):
            for key, value in state.items():
                whole = states[self.indices[i]][key]
                # Any number of ranks may have written `whole`: each takes the run of elements that is its own now.
                value.copy_(whole if key == "step" else self.part(i, whole.contiguous()))


class MuonAdamW(torch.optim.Optimizer):
    """Muon groups and AdamW groups in one optimizer, sharded over the ranks of the process group if there is one.

    Groups: {"kind": "muon" | "adamw", "params": [...], "names": [...] (optional), hyperparameters}, see MUON_DEFAULTS
    and ADAMW_DEFAULTS. A step: backward; reduce_gradients(); norm = grad_norm(); step(multiplier); zero_grad().
    Over several ranks a parameter must have a gradient on all of them or on none.
    Raises: ValueError for a wrong group, RuntimeError for distributed=True without a process group.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]], *, distributed: bool | None = None) -> None:
        self.ranks = Ranks(distributed)
        # One bucket per AdamW group and per stack of matrices, in the order of the groups: the unit in which gradients
        # are reduced, updates made and parameters gathered.
        self.names: list[str] = []
        self.buckets: list[MuonStack | AdamWTensors] = []
        self.reduced = self.ranks.world == 1  # alone there is nothing to average
        super().__init__(param_groups, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check the group, fill in its defaults and divide it over the ranks."""
        # Unknown keys are refused: with a misspelt one the run would train with the default, and nobody would notice.
        kind = param_group.get("kind")
        if kind not in ("muon", "adamw"):
            raise ValueError(f'a parameter group has kind {kind!r}, expected "muon" or "adamw"')
        defaults = MUON_DEFAULTS if kind == "muon" else ADAMW_DEFAULTS
        unknown = set(param_group) - set(defaults) - LABELS
        if unknown:
            raise ValueError(f"unknown keys in a {kind} group: {sorted(unknown)}; known: {sorted(defaults)}")
        group = {**defaults, **param_group, "params": list(param_group["params"])}
        # The schedule multiplies these, as torch's own schedulers do; `lr` is what holds in the step at hand.
        params, group["initial_lr"] = group["params"], group.get("initial_lr", group["lr"])
        group.setdefault("initial_weight_decay", group["weight_decay"])
        names = group.pop("names", None) or [str(len(self.names) + i) for i in range(len(params))]
        if len(names) != len(params):
            raise ValueError(f"a {kind} group has {len(params)} params but {len(names)} names")
        if duplicates := set(names) & set(self.names):
            raise ValueError(f"two parameters share a name: {sorted(duplicates)}")
        if kind == "muon":
            newton_schulz_coefficients(group["coefficients"], 1)
            if wrong := [f"{n} {tuple(p.shape)}" for n, p in zip(names, params, strict=True) if p.dim() != 2]:
                raise ValueError(f"Muon takes matrices only; put these into an adamw group: {', '.join(wrong)}")
        # Without the mark for torch's compiler, whose import takes a second.
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, group)
        self._add_buckets(group, len(self.names))
        self.names.extend(names)

    def set_product_dtype(self, dtype: torch.dtype | None) -> None:
        """Let Muon multiply in `dtype` where its groups say nothing else; None: as the device is fast at."""
        for group in self.param_groups:
            if group["kind"] == "muon" and group["ns_dtype"] is None:
                group["ns_dtype"] = dtype

    def _add_buckets(self, group: dict[str, Any], first: int) -> None:
        params = group["params"]
        if group["kind"] == "adamw":
            self.buckets.append(AdamWTensors(group, params, list(range(first, first + len(params))), self.ranks))
            return
        # Matrices of one shape make one stack, (N, R, C): a few large batched products instead of N small ones. A rank
        # works on whole matrices of it, for orthogonalising needs all of a matrix.
        shapes: dict[Any, list[int]] = {}
        for i, p in enumerate(params):
            shapes.setdefault((p.shape, p.dtype, p.device), []).append(i)
        for (shape, _, _), members in shapes.items():
            most = max(1, STACK_ELEMENTS // shape.numel()) * self.ranks.world
            for start in range(0, len(members), most):
                run = members[start : start + most]
                self.buckets.append(MuonStack(group, [params[i] for i in run], [first + i for i in run], self.ranks))

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Average the gradients over the ranks; each keeps its share, and every p.grad becomes None. Alone: no-op."""
        if self.ranks.world == 1:
            return
        # The list starts all messages, the loop waits for them in the same order.
        for finish in [bucket.reduce() for bucket in self.buckets]:
            finish()
        self.reduced = True

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """L2 norm of all averaged gradients, 0-dim on the device, no host sync; the same on all ranks.

        Not finite if any gradient of any rank is not. float32 (float64 for float64 gradients).
        """
        self._check_reduced()  # without it every rank would clip by the norm of its own gradients
        # On the device and without a host sync: Precision.step reads it together with the loss.
        norm = with_more_memory(
            lambda: get_total_norm([grad for bucket in self.buckets for grad in bucket.own_grads()])
        )
        if self.ranks.world > 1:
            # Squares of parts add up to the square of the whole; a NaN or inf of one rank makes the sum so on all.
            device = self.param_groups[0]["params"][0].device
            square = norm.to(device).square()
            dist.all_reduce(square)
            norm = square.sqrt()
        return norm if norm.dtype == torch.float64 else norm.float()

    @torch.no_grad()
    def step(self, grad_multiplier: Tensor | float = 1.0) -> None:  # type: ignore[override]
        """Update with gradients times grad_multiplier (unscaling and clipping in one); overwrites the gradients."""
        # Buckets are independent. A step that runs out of memory inside one is made again from where it stopped, so no
        # parameter is updated twice (see MuonStack.step).
        self._check_reduced()
        waiting: Callable[[], None] | None = None
        for bucket in self.buckets:
            with_more_memory(partial(bucket.step, grad_multiplier))
            # Gather this bucket while the next one is computed: one message under way, one update.
            if self.ranks.world > 1:
                finish, waiting = waiting, bucket.share_params()
                if finish is not None:
                    finish()
        if waiting is not None:
            waiting()
        # A fused kernel, torch's or the crate's, leaves no trace of what it wrote. Whoever keeps the weights in another
        # form (`FastDecoder`) asks for these counts.
        for p in (p for bucket in self.buckets for p in bucket.params):
            torch.autograd.graph.increment_version(p)
        self._clear()

    def _check_reduced(self) -> None:
        if not self.reduced:
            raise RuntimeError("call reduce_gradients() after backward, before grad_norm() and step()")

    def _clear(self) -> None:
        for bucket in self.buckets:
            bucket.clear()
        self.reduced = self.ranks.world == 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, the averaged ones too: also the way to skip a step."""
        inspect.unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)  # as in add_param_group
        self._clear()  # the averaged parts live apart from p.grad

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The whole state, whatever the number of ranks, by parameter order. Collective: call it on every rank.

        Alone the tensors are the optimizer's own, as in PyTorch; over several ranks they are copies in host memory.
        """
        # torch's format: parameters are numbers in the order of the groups, tensors lie under "state".
        groups, first = [], 0
        for group in self.param_groups:
            count = len(group["params"])
            groups.append({**group, "params": list(range(first, first + count))})
            first += count
        states = {index: state for bucket in self.buckets for index, state in bucket.export_state().items()}
        return {"state": dict(sorted(states.items())), "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state and hyperparameters of a state_dict, written by any number of ranks.

        Raises: ValueError if groups or shapes do not match.
        """
        saved, groups = state_dict["param_groups"], self.param_groups
        if [(g["kind"], len(g["params"])) for g in saved] != [(g["kind"], len(g["params"])) for g in groups]:
            raise ValueError("the saved optimizer has other parameter groups; was it written for this model?")
        for group, other in zip(groups, saved, strict=True):
            group.update({key: value for key, value in other.items() if key != "params"})
        self._import(state_dict["state"])

    @torch.no_grad()
    def flat_state(self) -> dict[str, Tensor]:
        """The state as {"<parameter name>.<key>": tensor}, e.g. for safetensors. Collective, as state_dict()."""
        states = self.state_dict()["state"]
        return {f"{self.names[index]}.{key}": x for index, state in states.items() for key, x in state.items()}

    @torch.no_grad()
    def own_flat_state(self) -> dict[str, Tensor]:
        """This rank's part of flat_state(), the optimizer's own tensors. Not collective.

        Of a tensor that is split over the ranks it is a flat run of elements, to be concatenated in the ranks' order.
        """
        states = {index: state for bucket in self.buckets for index, state in bucket.export_own_state().items()}
        return {f"{self.names[index]}.{key}": x for index, state in states.items() for key, x in state.items()}

    @torch.no_grad()
    def load_flat_state(self, flat: dict[str, Tensor]) -> None:
        """Take the state written by flat_state(), or the own_flat_state() of all ranks, concatenated.

        Raises: ValueError if a name or shape does not match.
        """
        index_of = {name: index for index, name in enumerate(self.names)}
        # By name, not by index: a checkpoint outlives the order in which a model lists its parameters.
        states: dict[int, dict[str, Tensor]] = {}
        for full_name, value in flat.items():
            name, _, key = full_name.rpartition(".")
            if name not in index_of:
                raise ValueError(f"optimizer state {full_name!r} belongs to no parameter of this model")
            states.setdefault(index_of[name], {})[key] = value
        self._import(states)

    def _import(self, states: dict[int, dict[str, Tensor]]) -> None:
        for bucket in self.buckets:
            bucket.state.clear()
            if states:
                self._check_state(bucket, states)
                bucket.import_state(states)

    def _check_state(self, bucket: MuonStack | AdamWTensors, states: dict[int, dict[str, Tensor]]) -> None:
        for p, index in zip(bucket.params, bucket.indices, strict=True):
            expected = bucket.state_shapes(p)
            # The parts of several ranks, put one after the other, are flat: their shape is given back here.
            for key, value in states.get(index, {}).items():
                shape = expected.get(key, ())
                if value.dim() == 1 < len(shape) and value.numel() == math.prod(shape):
                    states[index][key] = value.view(shape)
            found = {key: tuple(value.shape) for key, value in states.get(index, {}).items()}
            if found != expected:
                raise ValueError(f"optimizer state of {self.names[index]} is {found or 'missing'}, expected {expected}")
