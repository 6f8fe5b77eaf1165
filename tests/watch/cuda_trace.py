"""A CUDA trace in the shape that torch 2.13 writes: two steps of ranges, kernels, a copy and an all-reduce."""

from __future__ import annotations

from typing import Any

HOST = 4242
NCCL = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def cuda_trace(collective: tuple[float, float] = (585, 40)) -> dict[str, Any]:
    """`collective` is when in a step the all-reduce starts on the device, and how long it takes (microseconds)."""
    events: list[dict[str, Any]] = []

    def add(cat: str, name: str, pid: int, tid: int, ts: float, dur: float, **args: Any) -> None:
        events.append({"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args})

    def host(cat: str, name: str, ts: float, dur: float) -> int:
        number = len(events) + 1
        add(cat, name, HOST, HOST, ts, dur, **{"External id": number, "Ev Idx": number})
        return number

    def launch(op: int, call: str, cat: str, kernel: str, kind: str, ts: float, dur: float, stream: int = 7) -> None:
        link = 1000 + len(events)
        add(cat, call, HOST, HOST, ts - 20, 4.5, **{"External id": op, "cbid": 211, "correlation": link})
        ends = {"id": link, "cat": "ac2g", "name": "ac2g"}
        events.append({"ph": "s", "pid": HOST, "tid": HOST, "ts": ts - 20, **ends})
        more: dict[str, Any] = {"bytes": 4096, "memory bandwidth (GB/s)": 1.2}
        if kind == "kernel":
            more = {"blocks per SM": 1.5, "est. achieved occupancy %": 30, "grid": [198, 1, 1], "block": [256, 1, 1]}
        if kernel == NCCL:
            more |= {"Collective name": "allreduce", "In msg nelems": 1024, "Out msg nelems": 1024}
        place = {"External id": op, "device": 0, "context": 1, "stream": stream, "correlation": link}
        add(kind, kernel, 0, stream, ts, dur, **place, **more)
        events.append({"ph": "f", "pid": 0, "tid": stream, "ts": ts, "bp": "e", **ends})

    for step in (2, 3):
        t = 4_436_888_520_000.125 + (step - 2) * 1000
        host("user_annotation", f"ProfilerStep#{step}", t, 990.0)
        host("user_annotation", "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", t + 5, 80.0)
        op = host("cpu_op", "aten::to", t + 90, 30.0)
        launch(op, "cudaMemcpyAsync", "cuda_runtime", "Memcpy HtoD (Pageable -> Device)", "gpu_memcpy", t + 115, 8.0)
        host("user_annotation", "forward", t + 130, 200.0)
        op = host("cpu_op", "aten::addmm", t + 145, 90.0)
        launch(op, "cuLaunchKernelEx", "cuda_driver", "sm90_xmma_gemm_bf16", "kernel", t + 170, 150.0)
        host("user_annotation", "backward", t + 340, 200.0)
        op = host("cpu_op", "aten::mul", t + 350, 60.0)
        launch(op, "cudaLaunchKernel", "cuda_runtime", "vectorized_elementwise_kernel", "kernel", t + 380, 120.0)
        host("user_annotation", "aflora.all_reduce", t + 550, 90.0)
        op = host("user_annotation", "nccl:all_reduce", t + 560, 50.0)
        start, dur = collective
        launch(op, "cudaLaunchKernelExC", "cuda_runtime", NCCL, "kernel", t + start, dur, stream=20)
        host("user_annotation", "optimizer", t + 700, 200.0)
        op = host("cpu_op", "aten::_fused_adamw_", t + 710, 100.0)
        launch(op, "cudaLaunchKernel", "cuda_runtime", "multi_tensor_apply_kernel", "kernel", t + 740, 60.0)
        for name, start, dur in ((f"ProfilerStep#{step}", t + 115, 700.0), ("forward", t + 170, 150.0)):
            add("gpu_user_annotation", name, 0, 7, start, dur, **{"External id": 1})
    device = {"id": 0, "name": "a GPU", "totalGlobalMem": 85_000_000_000, "computeMajor": 9, "computeMinor": 0}
    return {"schemaVersion": 1, "deviceProperties": [device], "traceEvents": events, "traceName": "trace.json"}
