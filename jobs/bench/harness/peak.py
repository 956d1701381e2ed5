"""The peak speed of the machine: GFLOP/s of a large matrix product, on all cores or on the GPU.

    python -m jobs.bench.harness.peak

Prints JSON: number format → GFLOP/s. A product has 2 n³ operations. bfloat16 only if the hardware supports it.
"""

import json
import time

import torch

from pipeline.estimates.machines import cpus_here

CPU_SIDE, GPU_SIDE = 2048, 8192
TRIES = 20


def gemm_gflops(dtype: torch.dtype, device: str, side: int) -> float:
    """The best of TRIES products of two matrices of side × side."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(TRIES):
        _wait(device)
        started = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best / 1e9


def has_bfloat16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    torch.set_num_threads(cpus_here())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = [torch.float32, *([torch.bfloat16] if has_bfloat16(device) else [])]
    side = GPU_SIDE if device == "cuda" else CPU_SIDE
    print(json.dumps({str(dtype).removeprefix("torch."): gemm_gflops(dtype, device, side) for dtype in dtypes}))


if __name__ == "__main__":
    main()
