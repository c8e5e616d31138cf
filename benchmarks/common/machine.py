"""What a benchmark ran on, named so that its numbers cannot be taken for those of another processor."""

import os
import pathlib
import platform

INSTRUCTIONS = {"avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_bf16": "AMX"}


def cpu_info() -> dict[str, str]:
    """:return: what Linux knows of the first core, nothing on other systems"""
    try:
        lines = [line.partition(":") for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in reversed(lines)}


def multiplies_bfloat16() -> bool:
    """:return: whether the processor has an instruction for products of bfloat16"""
    return bool({"avx512_bf16", "amx_bf16"} & set(cpu_info().get("flags", "").split()))


def processor(device: str) -> str:
    """
    :param device: "cpu" or "cuda"
    :return: name of what computes, with what matters for matrix products
    """
    if device == "cuda":
        import torch as th

        return th.cuda.get_device_name()
    info = cpu_info()
    if not info:
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    name = info.get("model name", platform.machine())
    if "model" in info:
        name += f" (family {info.get('cpu family')}, model {info['model']})"
    flags = info.get("flags", "").split()
    return ", ".join([name, *(text for flag, text in INSTRUCTIONS.items() if flag in flags), f"{os.cpu_count()} cores"])
