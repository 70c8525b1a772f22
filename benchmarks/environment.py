"""What a figure was measured on."""

import importlib.metadata
import platform
from pathlib import Path

import torch


def describe() -> str:
    """Processor, number of threads and versions, in one line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = f"{names[0]}, {len(names)} cores seen" if names else processor
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers"))
    return f"{processor}; {torch.get_num_threads()} thread(s); Python {platform.python_version()}, {versions}"
