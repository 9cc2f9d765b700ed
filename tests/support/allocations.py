"""Allocation problems: at random, and a chain of layers."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from torchslim.allocation.problem import Decision, Problem, Term


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to five decisions of up to four options, and terms over up to three of them in any order."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    whole = draw(st.booleans())  # whole numbers have ties

    def terms(low: float) -> tuple[Term, ...]:
        scopes = draw(
            st.lists(
                st.lists(st.integers(0, len(sizes) - 1), max_size=3, unique=True).map(tuple), min_size=1, max_size=5
            )
        )
        shapes = [[sizes[decision] for decision in scope] for scope in scopes]
        return tuple(
            Term(
                decisions=scope,
                values=generator.integers(int(low * 3), 4, shape) if whole else generator.uniform(low, 1, shape),
            )
            for scope, shape in zip(scopes, shapes, strict=True)
        )

    return Problem(
        decisions=tuple(Decision(name=f"d{n}", options=tuple(range(size))) for n, size in enumerate(sizes)),
        damage=terms(-1),
        costs={"latency": terms(0), "size_bytes": terms(0)},
    )


def chain(count: int = 3) -> Problem:
    """Widths in a row: the latency of each layer is the product of the widths before and after it."""
    widths = (4, 2, 1)
    pairs = tuple(
        Term(decisions=(number, number + 1), values=np.outer(widths, widths).astype(float))
        for number in range(count - 1)
    )
    return Problem(
        decisions=tuple(Decision(name=f"width {number}", options=widths) for number in range(count)),
        damage=tuple(Term(decisions=(number,), values=np.array([0.0, 1.0, 3.0])) for number in range(count)),
        costs={
            "latency": pairs,
            "params": tuple(Term(decisions=(number,), values=np.array(widths, float)) for number in range(count)),
        },
    )
