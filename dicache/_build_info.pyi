"""What only C++ knows of a build, and how an operator will be launched.

In csrc/python/build_info.cpp. A wheel for all versions of Python has no such module.
"""

from typing import TypedDict

class BuildFacts(TypedDict):
    compiler: str
    instruction_set: str

class LaunchPlan(TypedDict):
    launches: int
    blocks: int
    threads: int
    workspace_bytes: int
    cpu_tasks: int

def build_facts() -> BuildFacts: ...
def launch_plan(operator: str, batch: int, size: int, multiprocessors: int) -> LaunchPlan: ...
