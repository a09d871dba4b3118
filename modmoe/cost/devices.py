"""The rates of devices as their vendors publish them: the table behind ``--estimate-for``.

Rates are dense (without structured sparsity) and with sums in float32, as torch computes. Where a vendor publishes
only the sparse rate, it is halved.

    A100    https://www.nvidia.com/en-us/data-center/a100/
    H100    https://www.nvidia.com/en-us/data-center/h100/
    H200    https://www.nvidia.com/en-us/data-center/h200/
    L4      https://www.nvidia.com/en-us/data-center/l4/
    L40S    https://www.nvidia.com/en-us/data-center/l40s/
    T4      https://www.nvidia.com/en-us/data-center/tesla-t4/
    RTX 30  https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf; of the 3060,
            https://www.nvidia.com/en-us/geforce/graphics-cards/30-series/rtx-3060-3060ti/, from its cores and clock
    RTX 40  https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    M2      https://support.apple.com/en-us/111869 has memory and bandwidth; its rates are estimates of this package
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from modmoe.errors import RecipeError, did_you_mean

_CPU_BANDWIDTH = 2e10
"""Bytes a second of two channels of DDR4, roughly; the bandwidth of a CPU is not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device; for a GPU ``cores`` are those of its machine."""

    name: str
    """Its name on the command line."""
    memory_bytes: int
    """Memory of the device; for a CPU the machine's free memory."""
    bandwidth: float
    """Bytes a second of its memory."""
    bfloat16_flops: float
    """Operations a second in products of bfloat16."""
    float32_flops: float
    """Operations a second in products of float32."""
    link: float | None = None
    """Bytes a second between host and device in one direction; None is a CPU, which has no other memory."""
    cores: int = 8
    """CPU cores; an assumption for machines with a GPU."""
    core_flops: float = 5e10
    """float32 operations a second of one core."""

    @property
    def is_cpu(self) -> bool:
        """Whether the model runs on the CPU."""
        return self.link is None


def _gpu(
    name: str, memory_gb: int, bandwidth_gb: float, bfloat16_tera: float, float32_tera: float, link_gb: int
) -> Device:
    return Device(
        name=name,
        memory_bytes=memory_gb * 10**9,
        bandwidth=bandwidth_gb * 1e9,
        bfloat16_flops=bfloat16_tera * 1e12,
        float32_flops=float32_tera * 1e12,
        link=link_gb * 1e9,
    )


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # Turing has no products of bfloat16; torch lets it compute them as float32
        _gpu("t4", 16, 320, 8.1, 8.1, 16),
        _gpu("l4", 24, 300, 121, 30.3, 32),
        _gpu("l40s", 48, 864, 362, 91.6, 32),
        _gpu("rtx-3060-12gb", 12, 360, 25.5, 12.7, 16),
        _gpu("rtx-3090", 24, 936, 71, 35.6, 32),
        _gpu("rtx-4090", 24, 1008, 165.2, 82.6, 32),
        _gpu("a100-40gb", 40, 1555, 312, 19.5, 32),
        _gpu("a100-80gb", 80, 2039, 312, 19.5, 32),
        _gpu("h100-80gb", 80, 3350, 989, 67, 64),
        _gpu("h200", 141, 4800, 989, 67, 64),
        Device(
            name="m2-16gb",  # its CPU: modmoe runs on none of Apple's GPUs
            memory_bytes=16 * 10**9,
            bandwidth=1e11,
            bfloat16_flops=2e11,
            float32_flops=4e11,
        ),
    )
}
"""Name to device. ``cpu`` is this machine's, and no name its GPU where it has one that is here."""


def find_device(name: str) -> Device:
    """Return the device of a name, ``cpu`` for this machine's, ``auto`` for its GPU if there is one that is known.

    Raises RecipeError with all the names there are.
    """
    name = check_name(name)
    if name == "auto" and torch.cuda.is_available():
        found = _known_gpu(torch.cuda.get_device_name())
        if found is not None:
            return found
    if name in ("auto", "cpu"):
        return measure_cpu()
    return DEVICES[name]


def check_name(name: str) -> str:
    """Return a device's name as the table has it; RecipeError with all the names where it is none."""
    known = ["auto", "cpu", *DEVICES]
    if name.lower() not in known:
        hint = did_you_mean(name.lower(), known)
        problem = f"no device '{name}'; known are {', '.join(known)}"
        raise RecipeError("--estimate-for", problem, hint if "Did you mean" in hint else "")
    return name.lower()


def _known_gpu(full_name: str) -> Device | None:
    """Return the device of what torch calls a GPU, such as NVIDIA GeForce RTX 4090 or NVIDIA A100-SXM4-80GB."""
    words = full_name.lower().replace("-", " ").split()
    fitting = [device for name, device in DEVICES.items() if set(name.split("-")) <= {*words}]
    if not fitting:  # the memory may not be in it
        fitting = [device for name, device in DEVICES.items() if set(name.split("-")[:-1] or [name]) <= {*words}]
    memory = torch.cuda.get_device_properties(0).total_memory if fitting else 0
    return min(fitting, key=lambda device: abs(device.memory_bytes - memory), default=None)


def measure_cpu() -> Device:
    """Return this machine's CPU: its free memory, its cores, and what they do in products of 256 x 1024 x 1024.

    The rates are of a machine that has nothing else to do: they are by processor time.
    """
    from modmoe.analysis.passes.by_layer import free_bytes

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(torch.get_num_threads(), cores)
    core_flops = _rate_of_core(torch.float32)
    return Device(
        name="cpu",
        memory_bytes=free_bytes(torch.device("cpu")),
        bandwidth=_CPU_BANDWIDTH,
        bfloat16_flops=_rate_of_core(torch.bfloat16) * cores,
        float32_flops=core_flops * cores,
        cores=cores,
        core_flops=core_flops,
    )


def _rate_of_core(dtype: torch.dtype) -> float:
    """Return the operations of the best of some products in a second of one core."""
    one, two = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best_s = float("inf")
    for _ in range(5):
        started_s = time.process_time()
        one @ two
        best_s = min(best_s, time.process_time() - started_s)
    return 2 * 256 * 1024 * 1024 / max(best_s, 1e-6)
