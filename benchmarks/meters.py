"""What is counted and timed inside of a step: memory, operations, bytes communicated, and the peak to compare with."""

import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback


class StepProfile(contextlib.AbstractContextManager):
    """
    The peak memory of a step over its beginning, in bytes, and unless `times_operations` is False the time of its
    operations, in seconds by name.
    """

    def __init__(self, device: torch.device, times_operations: bool = True):
        self.on_gpu, self.times_operations = device.type == "cuda", times_operations
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu
        self.profiler = torch.profiler.profile(activities=activities, profile_memory=not self.on_gpu)

    def __enter__(self):
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        self.profiler.__enter__()
        return self

    def __exit__(self, *exception):
        self.profiler.__exit__(*exception)
        if self.on_gpu:
            self.peak = torch.cuda.max_memory_allocated() - self.before
        else:
            events = self.profiler.profiler.kineto_results.events()
            events = sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns())
            self.peak = int(max(np.cumsum([event.nbytes() for event in events]), default=0))
        if self.times_operations:
            self.seconds = self._seconds()
        self.profiler = None

    def _seconds(self) -> dict[str, float]:
        name = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        operations = [
            op
            for op in self.profiler.key_averages()
            if not self.on_gpu or (op.device_type == DeviceType.CUDA and not op.is_user_annotation)
        ]
        return {op.key: getattr(op, name) / 1e6 for op in operations}


class CountCollectives(TorchDispatchMode, TrainerCallback):
    """
    Bytes by collective, those of the whole tensor that a collective is about: what an all-gather returns, what a
    reduce-scatter is given. They are counted over whole optimizer steps: from the end of step `first_step` on, as
    engines broadcast in the first step and trace their parameters, until `last_step` or the last one ends.
    """

    first_step = 2

    def __init__(self, last_step: int | None = None):
        super().__init__()
        self.last_step = last_step
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function.__name__.split(".")[0].strip("_")
            self.bytes[name] += max(_nbytes(value) for value in (*args, result))
        return result

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first_step:
            self.__enter__()
        if state.global_step == (self.last_step or state.max_steps):
            self.__exit__(None, None, None)


def _nbytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def bytes_sent(by_collective: Mapping[str, float], ranks: int) -> float:
    """What each rank sends, with ring algorithms: an all-reduce is a reduce-scatter and an all-gather."""
    passes = {name: 2 if name.replace("_", "").startswith("allreduce") else 1 for name in by_collective}
    return sum(size * passes[name] * (ranks - 1) / ranks for name, size in by_collective.items())


def measure_matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """FLOPs a second of a large matrix product: the peak that a model could reach at best."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.median(seconds))
