"""The launches of a decode step, from the backend's own forward pass over tensors without memory (see `compiled`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels.oracle.operands import DecodeRows, PrefillChunks
from ...runtime.backends.torch.forward import Forward, MemberRows, RowInputs
from ...runtime.backends.torch.paged_cache import PagedCache
from . import problems as make
from .compiled import Launch
from .random_model import RandomModel, shape

BLOCK_SIZE = 16
CACHES = ("keys", "values", "key_scales", "value_scales")
NO_KERNEL = ("empty", "detach", "lift", "alias")  # ops that only allocate or give another name


class _TorchKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the ops of torch that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(NO_KERNEL) and name != "_unsafe_view":
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def run(name: str, bits: int, batch_size: int, context: int) -> Counter[str]:
    """A decode step of `batch_size` sequences with `context` positions each, from token ids to drawn tokens, on the
    shape `name` with one member. Returns the ops of torch in it; `compiled.recording` has the launches of Triton.

    The cache has just the blocks that the sequences fill, so the operands of attention have the bytes that it reads.
    """
    config, device, dtype = shape(name), torch.device("meta"), torch.bfloat16
    weights = RandomModel(config, bits, device, dtype).weights()
    width = -(-context // BLOCK_SIZE)
    cache = PagedCache(
        num_blocks=batch_size * width - 1,  # and the dummy block
        block_size=BLOCK_SIZE,
        trunk_layers=len(weights.trunk),
        tail_layers=[0],
        kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        dtype=dtype,
        device=device,
    )
    from ...kernels.triton import ops

    forward = Forward(config, weights, cache, ops, dtype)
    rows = make.integers(range(batch_size))
    tables = torch.empty(batch_size, width, dtype=torch.int32, device=device)
    none = make.integers([])
    inputs = RowInputs(
        rows, rows, DecodeRows(rows, rows, rows, tables, context), PrefillChunks(none, none, none, none, tables, 0)
    )
    mixture, draw = make.mixture([1] * batch_size), make.draw(batch_size)
    counted = _TorchKernels()
    with counted:
        states = forward.run(rows, inputs, [MemberRows(0, None, inputs)])
        ops.mix_head_sample(states, weights.head, mixture, draw)
    return counted.found


def moved_bytes(launch: Launch) -> int:
    """Bytes of a launch's operands, each once: what it must read and write. The cache counts whole in attention, and by
    the rows that are written in `rotary_write`; of rotary tables, the rows that are read."""
    seen: dict[int, int] = {}
    for name, tensor in launch.tensors.items():
        count = tensor.numel()
        if launch.kernel == "rotary_write.rotary_write" and name in CACHES:
            count = launch.grid[0] * tensor[0, :, 0].numel()
        elif launch.kernel == "rotary_write.rotary_write" and name in ("cos", "sin"):
            count = launch.grid[0] * tensor.shape[-1]
        seen[id(tensor)] = count * tensor.element_size()
    return sum(seen.values())
