"""What several GPUs would make of a cached run, on paper: nothing here was measured.

    python benchmarks/scale.py            # the tables of docs/several_gpus.md

A rank computes its share of the tokens, ranks exchange queries, keys, values and outputs in every
block, and a skipped step runs the probe's block, moves the cache's tensors once and asks the other
ranks. Times are numbers of operations and bytes over the rates of `MACHINE`, plus a latency for
every collective; nothing overlaps but what a ring sends between nodes. So the model is simple, and
kind to large n: it knows no kernel that is too small for its GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

BF16, FP32, FP64 = 2, 4, 8  # bytes
GPUS = (1, 8, 64)
REUSED = 0.5  # share of the steps that are reused
STATISTICS, COMBINATION, RECORD = 4, 4, 6  # passes over memory: docs/design/operators.md
FIRST_HEADER = 2  # numbers of the first rank's word: what else it saw, and a timestep


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and its links. Data sheets where it says so, else assumed.

    Attributes:
        flops: Of bf16 a second: 989e12 dense (NVIDIA H200 data sheet), half reached (assumed).
        memory: Bytes a second: 4.8e12 (H200 data sheet), 85 % reached (assumed).
        node: GPUs in a node, all connected by NVLink.
        inside: Bytes a second out of a GPU inside of its node: 450e9, half of the 900e9 that NVLink
            has in both directions (H200 data sheet), 70 % reached (assumed).
        between: The same between nodes: 50e9, one 400 Gb/s port a GPU (data sheet of ConnectX-7),
            80 % reached (assumed).
        latency_inside, latency_between: Seconds of a small collective: 20e-6 in a node, 50e-6 over
            several (assumed).
        host: Seconds that a probed step's two waits and copies of numbers take: 30e-6 (assumed; one
            wait on one GPU: half of it).
    """

    flops: float = 0.5 * 989e12
    memory: float = 0.85 * 4.8e12
    node: int = 8
    inside: float = 0.7 * 450e9
    between: float = 0.8 * 50e9
    latency_inside: float = 20e-6
    latency_between: float = 50e-6
    host: float = 30e-6


MACHINE = Machine()


@dataclass(frozen=True)
class Model:
    """One call of a transformer.

    Attributes:
        name: With the size of what it makes.
        video: Tokens x of the picture or video, which the cache keeps.
        text: Tokens that go through all blocks beside them.
        cross: Tokens of a text that blocks only read.
        width: D.
        blocks: Number of blocks.
        weights: Multiplications that a token meets in a block's matrices, in D^2.
    """

    name: str
    video: int
    text: int
    cross: int
    width: int
    blocks: int
    weights: float

    @property
    def tokens(self) -> int:
        """Those that attend to each other."""
        return self.video + self.text

    @property
    def block_flops(self) -> float:
        """Of one block: 2 a weight and token, and 4 D a pair of tokens that meet in attention."""
        pairs = self.tokens * (self.tokens + self.cross)
        return 2 * self.weights * self.width**2 * self.tokens + 4 * self.width * pairs


# Blocks of FLUX and HunyuanVideo have 4 D^2 in attention and 8 D^2 in the MLP, apart or as one;
# Wan's 4 in self-attention, 2 in cross-attention (the text's own are few), 2 x 13824 / 5120 in the
# MLP. Depth, width and tokens are those of the released configurations.
MODELS = (
    Model("FLUX, 1024 x 1024", 4096, 512, 0, 3072, 57, 12),
    Model("Wan 14B, 720p, 81 frames", 75600, 0, 512, 5120, 40, 6 + 2 * 13824 / 5120),
    Model("HunyuanVideo, 720p, 129 frames", 118800, 256, 0, 3072, 60, 12),
)


def exchange(model: Model, gpus: int, machine: Machine = MACHINE) -> tuple[float, float]:
    """Seconds that a block's exchange takes: what all wait for, and what a ring does meanwhile.

    In a node Ulysses: four times a rank gives away all but 1 / m of what it has, m its ranks in the
    node. Between nodes a ring: keys and values of all other nodes pass by, beside the attention.
    """
    inside, nodes = min(gpus, machine.node), max(1, gpus // machine.node)
    held = model.tokens * model.width * BF16 / gpus
    if inside == 1:
        return 0.0, 0.0
    given = 4 * held * (inside - 1) / inside
    ring = (nodes - 1) * (2 * held / machine.between + machine.latency_between)
    return given / machine.inside + 4 * machine.latency_inside, ring if nodes > 1 else 0.0


def block_seconds(model: Model, gpus: int, machine: Machine = MACHINE) -> float:
    """Of one block on every rank."""
    waits, beside = exchange(model, gpus, machine)
    return max(model.block_flops / gpus / machine.flops, beside) + waits


def computed_seconds(model: Model, gpus: int, machine: Machine = MACHINE) -> float:
    """Of a step without the cache."""
    return model.blocks * block_seconds(model, gpus, machine)


def decision_seconds(gpus: int, machine: Machine = MACHINE) -> float:
    """A total of all ranks, the first one's word, and two waits instead of one."""
    if gpus == 1:
        return machine.host / 2
    several = gpus > machine.node
    return 2 * (machine.latency_between if several else machine.latency_inside) + machine.host


def passes_seconds(model: Model, gpus: int, passes: int, machine: Machine = MACHINE) -> float:
    """Of so many passes over a tensor of the video's size."""
    return passes * model.video * model.width * BF16 / gpus / machine.memory


def reused_seconds(model: Model, gpus: int, machine: Machine = MACHINE) -> float:
    """Of a reused step: the probe's block, the cache's passes, the decision."""
    passes = passes_seconds(model, gpus, STATISTICS + COMBINATION, machine)
    return block_seconds(model, gpus, machine) + passes + decision_seconds(gpus, machine)


def run_seconds(model: Model, gpus: int, machine: Machine = MACHINE) -> float:
    """Of a step of a cached run, on average; a computed one is probed and recorded."""
    computed = computed_seconds(model, gpus, machine) + decision_seconds(gpus, machine)
    computed += passes_seconds(model, gpus, STATISTICS + RECORD, machine)
    return (1 - REUSED) * computed + REUSED * reused_seconds(model, gpus, machine)


def decision_bytes(batch: int = 1) -> int:
    """That a rank hands in in a probed step: sums [B, 6], and the first one's word."""
    return 6 * FP32 * batch + FP64 * (FIRST_HEADER + 2 * (batch + 1))


def cache_bytes(model: Model, gpus: int) -> float:
    """A rank's share of the four tensors of one branch of guidance."""
    return 4 * model.video * model.width * BF16 / gpus


def table() -> str:
    """A row a model and number of GPUs, as Markdown."""
    head = (
        "model",
        "GPUs",
        "cache a rank and branch, MiB",
        "computed step, ms",
        "reused step, ms",
        "of it decision, ms",
        "efficiency without cache",
        "efficiency with it",
        "speed-up by it",
    )
    lines = [head, ("---",) * len(head)]
    for model in MODELS:
        for gpus in GPUS:
            computed, run = computed_seconds(model, gpus), run_seconds(model, gpus)
            alone = computed_seconds(model, 1) / gpus / computed
            cached = run_seconds(model, 1) / gpus / run
            numbers = (
                f"{cache_bytes(model, gpus) / 2**20:.1f}",
                f"{1e3 * computed:.1f}",
                f"{1e3 * reused_seconds(model, gpus):.2f}",
                f"{1e3 * decision_seconds(gpus):.3f}",
                f"{alone:.0%}",
                f"{cached:.0%}",
                f"{computed / run:.2f}",
            )
            lines.append((model.name, str(gpus), *numbers))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
    print(f"\nA decision: {decision_bytes()} bytes a rank, for a batch of one.")
