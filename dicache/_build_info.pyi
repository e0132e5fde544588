"""What was built, and how an operator will be launched (csrc/python/build_info.cpp)."""

from typing import TypedDict

class BuildFacts(TypedDict):
    compiler: str
    torch_stable_abi: str
    cuda: str | None
    cuda_architectures: str | None
    instruction_set: str

class LaunchPlan(TypedDict):
    launches: int
    blocks: int
    threads: int
    workspace_bytes: int
    cpu_tasks: int

def build_facts() -> BuildFacts: ...
def launch_plan(operator: str, batch: int, size: int, multiprocessors: int) -> LaunchPlan: ...
