"""What a benchmark ran on, named so that its numbers cannot be taken for those of another processor."""

import os
import pathlib
import platform

INSTRUCTIONS = {"avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_bf16": "AMX"}


def processor(device: str) -> str:
    """
    :param device: "cpu" or "cuda"
    :return: name of what computes, with what matters for matrix products
    """
    if device == "cuda":
        import torch as th

        return th.cuda.get_device_name()
    try:
        lines = [line.partition(":") for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()]
        facts = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    except OSError:
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    name = facts.get("model name", platform.machine())
    if "model" in facts:
        name += f" (family {facts.get('cpu family')}, model {facts['model']})"
    flags = facts.get("flags", "").split()
    return ", ".join([name, *(text for flag, text in INSTRUCTIONS.items() if flag in flags), f"{os.cpu_count()} cores"])
