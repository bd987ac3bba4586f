"""python -m fsattn info: versions, devices and the kernels of this build."""

from __future__ import annotations

import argparse
import platform

import torch

from ._library import describe_build


def cuda_is_usable() -> bool:
    """Whether PyTorch has a CUDA device and this build has kernels for CUDA."""
    return torch.cuda.is_available() and "sm_" in describe_build()


def describe_torch() -> list[str]:
    """PyTorch and its devices; the library describes itself."""
    lines = [
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}, "
        f"{torch.get_num_threads()} CPU threads",
    ]
    if not torch.cuda.is_available():
        return [*lines, "torch sees no CUDA device"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        lines.append(
            f"torch cuda:{index}: {device.name}, compute capability {device.major}.{device.minor}, "
            f"{memory:.0f} GiB"
        )
    return lines


def main(argv: list[str]) -> int:
    """Prints what is installed; takes no options."""
    argparse.ArgumentParser(prog="python -m fsattn info", description=__doc__).parse_args(argv)
    print(describe_build().rstrip("\n"))
    print("\n".join(describe_torch()))
    return 0
