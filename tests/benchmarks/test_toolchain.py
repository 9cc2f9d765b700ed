"""The page of the toolchain's costs holds the medians of the newest rows, and says what was not measured."""

from __future__ import annotations

import torch

from benchmarks.one_toolchain import model_of
from benchmarks.toolchain import JOBS, SIZES, models_of, page


def row(job: str, model: str, side: str, cpu_s: float | None, version: str = "new", **more):
    return {"job": job, "model": model, "side": side, "version": version, "cpu_s": cpu_s, "peak_mib": 100, **more}


def test_the_page_gives_medians_of_the_newest_version_and_their_ratio() -> None:
    rows = [row("prune", "lstm", "ours", 99.0, "old"), *(row("prune", "lstm", "ours", s) for s in (1.0, 9.0, 3.0))]
    rows += [row("prune", "lstm", "peer", 2.0, "peer 1"), row("nodes", "scan-3000", "ours", 5.0)]
    rows.append(row("prune", "bert", "peer", None, "peer 1", reason="above 900 s"))
    lines = page(rows).splitlines()
    cells = [next(line for line in lines if line.startswith(f"| {name} ")) for name in ("lstm", "bert", "scan-3000")]
    assert "| 3.0 | 2.0 | 1.50 |" in cells[0]
    assert cells[0].endswith("| new, peer 1 |")
    assert "| not measured | above 900 s | not measured |" in cells[1]
    assert "| 5.0 | not measured | not measured |" in cells[2]
    assert all(f"## {title}" in lines for title, *_ in JOBS.values())


def test_the_scan_is_that_of_a_loop_and_has_the_operations_it_is_named_for() -> None:
    name = SIZES[0]
    assert name in models_of("nodes")
    assert name not in models_of("prune")
    model, ((x,),) = model_of(name)
    decay, entered, read = model.decay(x).sigmoid(), model.enter(x), model.read(x)
    state, expected = entered[:, 0], []
    for step in range(x.shape[1]):
        state = torch.einsum("bs,bs->bs", decay[:, step], state) + entered[:, step]
        expected.append(torch.einsum("bs,bs->b", state, read[:, step]))
    torch.testing.assert_close(model(x), torch.stack(expected, 1))
    assert x.shape[1] == 300 // 7
