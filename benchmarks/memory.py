"""
The bytes of weights, gradients and optimizer states on each rank, and what the penalty adds to them.

    python benchmarks/memory.py     # the tables of docs/multi_node.md
"""

from dataclasses import astuple, dataclass


ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
FP32 = 4
ADAM = 2 * FP32  # two moments


@dataclass(frozen=True)
class Memory:
    """
    Bytes on one rank. `optimizer` is its states and, where there is one, the fp32 master of the weights; `penalty` is
    what is held besides from the first pass to the end of the second.
    """

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    penalty: float = 0

    @property
    def plain(self) -> float:
        """Without the penalty."""
        return self.weights + self.gradients + self.optimizer

    def __mul__(self, factor: float) -> "Memory":
        return Memory(*(factor * value for value in astuple(self)))


def estimate_memory(
    engine: str,
    parameters: float,
    ranks: int,
    precision: str = "bf16",
    alpha: float = 0.8,
    fp32_accumulation: bool = False,
) -> tuple[Memory, Memory]:
    r"""
    The memory of the parameters of a model in full training with Adam, on each of `ranks` GPUs and beside it.

    Not counted: activations (with the 16-bit copies that autocast makes), layers that FSDP2 and ZeRO-3 have gathered,
    DeepSpeed's communication buckets, and alignment; nor what accumulation adds: whole gradients under FSDP2, a shard
    of them under ZeRO-2 with offload. Adapters: `parameters` is then the number of trainable ones, and the frozen
    weights come on top.

    Args:
        engine: One of `ENGINES`; "fsdp2" and "zero3" shard over all ranks. The offloads are those of
            `configs/deepspeed`: of the optimizer, and under ZeRO-3 of the weights too. One process is "ddp" on 1 rank.
        parameters: The number of trainable parameters, of the whole model.
        precision: "fp32", "bf16" or "fp16". 16 bit is autocast over fp32 weights for "ddp" and "fsdp2", 16-bit
            weights with an fp32 master under DeepSpeed.
        alpha: \\(\alpha\\). Under ZeRO \\(g_1\\) is kept only where it is mixed again, at less than 1.
        fp32_accumulation: DeepSpeed's `data_types.grad_accum_dtype` is "fp32", for 16-bit ZeRO.

    Returns:
        What is on the GPU, and what is in the host's memory for it.

    Raises:
        ValueError: for an engine or a precision that is not listed.
    """
    if engine not in ENGINES or precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"engine must be one of {ENGINES} and precision fp32, bf16 or fp16: {engine}, {precision}.")
    is_low = precision != "fp32" and engine not in ("ddp", "fsdp2")
    weight = 2 if is_low else FP32
    gradient = FP32 if fp32_accumulation else weight
    kept = 1 if alpha < 1 else 0
    shard = parameters / ranks
    # In fp32, too, ZeRO-1 to 3 (DeepSpeed 0.19.8) step on a master that is not the forward weight.
    states = FP32 + ADAM
    none = Memory()
    if engine == "ddp":
        # DDP reduces in buckets of its own, which together are as large as the gradients.
        return Memory(weight, gradient * (2 if ranks > 1 else 1), ADAM, weight) * parameters, none
    if engine == "fsdp2":
        return Memory(weight, gradient, ADAM, weight) * shard, none
    if engine == "zero0":
        return Memory(weight, gradient, states if is_low else ADAM, weight) * parameters, none
    if engine == "zero1":
        # With fp32 accumulation in bf16, g₂ is accumulated into the fp32 gradient, which is whole.
        is_bf16_optimizer = precision == "bf16" and fp32_accumulation
        sharded = Memory(optimizer=states, penalty=0 if is_bf16_optimizer else kept * gradient)
        return _add(Memory(weight, gradient) * parameters, sharded * shard), none
    if engine == "zero2":
        sharded = Memory(gradients=gradient, optimizer=states, penalty=kept * gradient)
        return _add(Memory(weight) * parameters, sharded * shard), none
    if engine == "zero3":
        return Memory(weight, gradient, states, kept * gradient) * shard, none
    if engine == "zero2_offload":
        # On the host gradients are fp32, and updated weights pass through a buffer on their way back.
        return Memory(weight) * parameters, Memory(weight, FP32, states, kept * FP32) * shard
    return none, Memory(weight, gradient + FP32, states, kept * FP32) * shard


def _add(a: Memory, b: Memory) -> Memory:
    return Memory(*(x + y for x, y in zip(astuple(a), astuple(b), strict=True)))


def table(host: bool = False, sizes: tuple[float, ...] = (1e9, 7e9, 70e9), ranks: tuple[int, ...] = (8, 64)) -> str:
    """A Markdown table in GB, of bf16 at the default α: plain training + what the penalty adds, on each rank."""
    columns = [(size, count) for size in sizes for count in ranks]
    lines = [
        "| engine | " + " | ".join(f"{size / 1e9:g}B, {count} GPUs" for size, count in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for engine in ENGINES:
        cells = [estimate_memory(engine, size, count)[host] for size, count in columns]
        if any(cell.plain for cell in cells):
            numbers = " | ".join(f"{cell.plain / 1e9:.1f} + {cell.penalty / 1e9:.1f}" for cell in cells)
            lines.append(f"| {engine} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"GB on each GPU:\n\n{table()}\n\nGB in the host's memory for each GPU:\n\n{table(host=True)}")
