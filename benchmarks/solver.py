"""Seconds that the solver takes for chains of groups with widths and schemes: python -m benchmarks.solver"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from torchslim.allocation.problem import Decision, Problem, Term
from torchslim.allocation.solver import solve

UNITS, WIDTHS, SCHEMES = (20, 60), 8, 3
RESIDUAL = 4  # groups of a block, which read the width of its stream
CEILINGS = (0.5, 0.3, 0.2, 0.1)
GAP = 1e-3
SPEED = np.array([1.0, 0.35, 0.3])  # time of each scheme over float
LOSS = np.array([0.0, 1.0, 3.0])  # of each scheme


def network(units: int, seed: int = 0) -> Problem:
    """A residual network at random: times depend on the width before, the own width and the scheme, and on borders."""
    generator = np.random.default_rng(seed)
    widths = [Decision(name=f"width {n}", options=tuple(range(WIDTHS, 0, -1))) for n in range(units)]
    schemes = [Decision(name=f"scheme {n}", options=("float", "int8", "int4-weights")) for n in range(units)]
    kept = np.linspace(1, 1 / WIDTHS, WIDTHS)
    times, damage = [], []
    for n in range(units):
        stream = n - n % RESIDUAL
        before = stream if n != stream else n - RESIDUAL if n >= RESIDUAL else None
        work = generator.lognormal()
        scope = (n, units + n) if before is None else (before, n, units + n)
        shape = np.multiply.outer(kept, SPEED) if before is None else np.multiply.outer(np.outer(kept, kept), SPEED)
        times.append(Term(decisions=scope, values=work * shape * generator.uniform(1, 1.1, shape.shape)))
        if n:
            border = 0.05 * work * (1 - np.eye(SCHEMES))
            times.append(Term(decisions=(units + n - 1, units + n), values=border))
        damage.append(Term(decisions=(n,), values=generator.lognormal() * (1 - kept) ** 2))
        damage.append(Term(decisions=(units + n,), values=0.05 * generator.lognormal() * LOSS))
    return Problem(decisions=(*widths, *schemes), damage=tuple(damage), costs={"latency": tuple(times)})


def main() -> None:
    """Print a row for each size and ceiling."""
    print("| groups | ceiling | seconds | proven gap |\n|---|---|---|---|")
    for units in UNITS:
        problem = network(units)
        full = problem.total(problem.costs["latency"], [0] * len(problem.decisions))
        for ceiling in CEILINGS:
            start = time.perf_counter()
            found = solve(replace(problem, limits={"latency": ceiling * full}), gap=GAP)
            print(f"| {units} | {ceiling:.0%} | {time.perf_counter() - start:.1f} | {found.gap:.2%} |", flush=True)


if __name__ == "__main__":
    main()
