"""How the torch backend runs: on which device, with which kernels."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

from ...errors import MissingPackageError


@dataclass(frozen=True, slots=True)
class TorchOptions:
    """How a `TorchBackend` runs. `TorchOptions.of_machine()` is the default."""

    device: torch.device
    dtype: torch.dtype  # of activations and of weights that are not quantised
    kernels: Literal["triton", "eager"]
    keep_quantised: bool  # keep weights quantised; else they are converted to `dtype` when they are loaded
    graphs: bool  # pad decode steps to a ladder of sizes; on a GPU, replay them
    capability: int | None = None  # of the GPU, such as 90 for sm_90; None: there is none

    @classmethod
    def of_machine(cls) -> TorchOptions:
        """A GPU with Triton kernels and graphs if there is one, else the CPU with the eager oracle in float32."""
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            capability = 10 * major + minor
            return cls(torch.device("cuda"), torch.bfloat16, "triton", True, True, capability)
        return cls(torch.device("cpu"), torch.float32, "eager", keep_quantised=False, graphs=False)


def load_ops(kernels: Literal["triton", "eager"]) -> ModuleType:
    """The module with the ops. Raises `MissingPackageError` if Triton is not installed."""
    if kernels == "eager":
        from ....kernels.oracle import eager

        return eager
    try:
        from ....kernels.triton import ops as gpu
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"the torch backend needs {error.name} on a GPU; install it with `pip install 'motet[gpu]'`"
        ) from error
    return gpu
