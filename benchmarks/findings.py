"""What follows from the findings of all stages: ratios, efficiencies, composed runs, and goals.

A goal without a measurement on a GPU is "not measured", never met. Needs neither torch nor a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stages import Finding, Outcome

BACKENDS = ("cuda", "triton")
OPERATORS = (
    "probe_statistics",
    "alignment_statistics",
    "probe_and_combine",
    "combine_residuals",
    "extrapolate_residuals",
    "record_residuals",
)
COPY_GOALS = {"flux": 0.75, "wan": 0.90, "hunyuan-video": 0.90}
PUBLISHED_GOAL = 4.5
HOST_GOAL_US = 8.0
EFFICIENCY_GOAL = 0.98
TENSORS_GOAL = 5
WHOLE, DENSITY = "sparse: all", 0.25
ATTENTION_GOAL = 2.5
BOTH_GOAL = 3.3

RUNS = ("dense", "sparse", "DiCache", "both")
Kind = tuple[str, str]  # the short run that has such a step, and its letter there
STEP_NAMES: dict[Kind, str] = {
    ("dense", "C"): "dense",
    ("sparse", "C"): "sparse",
    ("DiCache", "C"): "dense, recorded",
    ("both", "C"): "sparse, recorded",
    ("DiCache", "R"): "reused after dense",
    ("both", "R"): "reused after sparse",
}


@dataclass(frozen=True)
class Goal:
    """A stated goal, where it is one, what was measured, and whether that meets it."""

    text: str
    where: str
    measured: float | None
    wanted: float
    at_least: bool = True

    @property
    def status(self) -> str:
        """met, missed or not measured."""
        if self.measured is None:
            return "not measured"
        above, below = self.measured >= self.wanted, self.measured <= self.wanted
        return "met" if (above if self.at_least else below) else "missed"


class Findings:
    """What all stages emitted."""

    def __init__(self, outcomes: Sequence[Outcome], dry: bool) -> None:
        self.outcomes, self.dry = outcomes, dry

    def of_kind(self, kind: str) -> list[Finding]:
        """All findings of one kind."""
        return [found for outcome in self.outcomes for found in outcome.of_kind(kind)]

    def last(self, kind: str) -> Finding:
        """The last finding of its kind, or nothing."""
        return next(reversed(self.of_kind(kind)), {})

    # --- Operators -------------------------------------------------------------------------------

    def times(self) -> list[Finding]:
        """Rows with how many times faster they are than the reference and the published steps."""
        rows = self.of_kind("time")
        us = {(r["operation"], r["implementation"], r["size"]): r["microseconds"] for r in rows}
        for row in rows:
            own, size = row["microseconds"], row["size"]
            reference = us.get((row["operation"], "reference", size))
            # An operator alone is not what the published sequence does.
            is_step = row["operation"].startswith("skipped_step")
            published = us.get(("skipped_step", "published", size)) if is_step else None
            row["over_reference"] = reference / own if reference else None
            row["over_published"] = published / own if published else None
        return rows

    # --- Pipelines -------------------------------------------------------------------------------

    def pipelines(self) -> list[Finding]:
        """Rows with efficiency and speed-up, and the share of a run of ideal steps.

        One that did not follow its mask has none.
        """
        rows = [row | judge(row) for row in self.of_kind("pipeline")]
        same = ("model", "mask", "blocks")  # a later run may have had time for more of them
        ideal = [row for row in rows if row["implementation"] == "ideal"]
        ideal_ms = {tuple(row[key] for key in same): row["loop_ms"] for row in ideal}
        for row in rows:
            its_ideal = ideal_ms.get(tuple(row[key] for key in same))
            if its_ideal is not None and row["deviation"] is None:
                row["of_ideal_run"] = its_ideal / row["loop_ms"]
        return rows

    # --- Sparse VideoGen -------------------------------------------------------------------------

    def attention(self) -> list[Finding]:
        """Rows of attention alone, with `over_dense` and the `ideal` of it."""
        rows = self.of_kind("attention")
        dense = next((row["median_ms"] for row in rows if row["row"] == "dense flash"), None)
        for row in rows:
            row["over_dense"] = dense / row["median_ms"] if dense else None
            row["ideal"] = 1 / row["kept"] if "kept" in row else None
        return rows

    def composed(self) -> list[Finding]:
        """The four runs, with `over_dense`; without a time where a kind of step is missing."""
        plan, step_ms = self.last("schedule"), self._step_ms()
        if not plan:
            return []
        mask, leading = plan["mask"], plan["leading"]
        dense = compose("dense", mask, leading, step_ms)
        rows = []
        for run in RUNS:
            total = compose(run, mask, leading, step_ms)
            kinds = step_kinds(run, mask, leading).items()
            steps = " + ".join(f"{count} x {STEP_NAMES[kind]}" for kind, count in kinds)
            ratio = dense / total if dense and total else None
            rows.append({"run": run, "steps": steps, "total_ms": total, "over_dense": ratio})
        return rows

    def _step_ms(self) -> dict[Kind, float]:
        """Median time of every kind of step that was measured with the same number of blocks."""
        letters = (("C", "computed_ms"), ("R", "reused_ms"))
        blocks = self.last("steps").get("blocks")
        steps = [row for row in self.of_kind("steps") if row["blocks"] == blocks]
        return {(r["run"], c): r[key] for r in steps for c, key in letters if r[key] is not None}

    # --- Goals -----------------------------------------------------------------------------------

    def goals(self) -> list[Goal]:
        """All of them; what a CPU's clock says is none."""
        goals = [goal for backend in BACKENDS for goal in self._operator_goals(backend)]
        return goals + self._pipeline_goals() + self._sparse_goals()

    def _operator_goals(self, backend: str) -> list[Goal]:
        rows = [row for row in self.times() if row["implementation"] == backend]
        found = {(row["operation"], row["size"]): row for row in rows}
        host = [row for row in self.of_kind("host") if row["implementation"] == backend]
        host_us = {row["operation"]: row["microseconds"] for row in host}

        def value(operation: str, size: str, key: str) -> float | None:
            return found.get((operation, size), {}).get(key)

        goals = []
        for name in OPERATORS:
            for size, wanted in COPY_GOALS.items():
                text = f"{name} reaches {wanted:.0%} of a copy"
                measured = value(name, size, "fraction_of_copy")
                goals.append(Goal(text, f"{backend}, {size}", measured, wanted))
            launches = value(name, "flux", "launches")
            goals.append(Goal(f"{name} is one launch", f"{backend}, flux", launches, 1, False))
            text = f"{name} takes less than {HOST_GOAL_US:.0f} us of host time"
            where = f"{backend}, small"
            goals.append(Goal(text, where, host_us.get(name), HOST_GOAL_US, False))
        text = f"a skipped step is {PUBLISHED_GOAL}x as fast as the published sequence"
        for size in ("small", *COPY_GOALS):
            measured = value("skipped_step", size, "over_published")
            goals.append(Goal(text, f"{backend}, {size}", measured, PUBLISHED_GOAL))
        return goals

    def _pipeline_goals(self) -> list[Goal]:
        goals = []
        for model in self.of_kind("model"):
            mine = [
                row
                for row in self.pipelines()
                if (row["model"], row["implementation"]) == (model["model"], model["default"])
            ]
            row = mine[-1] if mine else {}
            measured = None if self.dry else row.get("efficiency")
            text = f"efficiency of a run is {EFFICIENCY_GOAL} or more"
            goals.append(Goal(text, model["model"], measured, EFFICIENCY_GOAL))
            text = f"at most {TENSORS_GOAL} cache tensors a context"
            tensors = row.get("cache_tensors")
            goals.append(Goal(text, model["model"], tensors, TENSORS_GOAL, False))
        return goals

    def _sparse_goals(self) -> list[Goal]:
        attention = [
            r for r in self.attention() if (r["row"], r.get("density")) == (WHOLE, DENSITY)
        ]
        both = [row for row in self.composed() if row["run"] == "both"]
        ratios = [
            None if self.dry or not each else each[-1]["over_dense"] for each in (attention, both)
        ]
        text = f"sparse attention at density {DENSITY}, with profiling and layout, over dense flash"
        return [
            Goal(text, "720p", ratios[0], ATTENTION_GOAL),
            Goal("a run with both over a dense one, composed", "720p", ratios[1], BOTH_GOAL),
        ]


def judge(row: Finding) -> dict[str, float]:
    """Efficiency and speed-up of a run that followed its mask.

    efficiency = (computed steps x full step + skipped steps x ideal skipped step) / measured time
    """
    if row["deviation"] is not None:
        return {}
    computed, skipped = row["mask"].count("C"), row["mask"].count("R")
    ideal = computed * row["full_ms"] + skipped * row["ideal_ms"]
    return {
        "efficiency": ideal / row["loop_ms"],
        "speed_up": row["uncached_loop_ms"] / row["loop_ms"],
    }


def step_kinds(run: str, mask: str, leading: int) -> Counter[Kind]:
    """How many steps of each kind a run has.

    Args:
        run: One of `RUNS`.
        mask: A letter a step: C computes, R reuses where there is a cache.
        leading: Steps at the start that keep full attention.
    """
    kinds: Counter[Kind] = Counter()
    for step, letter in enumerate(mask):
        is_sparse = run in ("sparse", "both") and step >= leading
        if run in ("DiCache", "both"):
            kinds["both" if is_sparse else "DiCache", letter] += 1
        else:
            kinds["sparse" if is_sparse else "dense", "C"] += 1
    return kinds


def compose(run: str, mask: str, leading: int, step_ms: dict[Kind, float]) -> float | None:
    """Milliseconds of a run, or `None` where a kind of step was not measured."""
    kinds = step_kinds(run, mask, leading)
    if not set(kinds) <= set(step_ms):
        return None
    return sum(count * step_ms[kind] for kind, count in kinds.items())
