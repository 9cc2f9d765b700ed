"""The steps that a suggested recipe searches, or the reasons why it leaves them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchslim.core.budget import Budget
from torchslim.core.hardware import saturates
from torchslim.quantize.schemes import SCHEMES
from torchslim.tuning.suggestion_text import (
    Document,
    Mix,
    Schooling,
    down,
    up,
    words,
)

MOST = 0.5  # fraction of the MACs that a runtime must compute on integers for a scheme to be worth a trial
WORTH_PRUNING = 0.15  # fraction of the model that removable channels must hold
MANY_DEPTHWISE = 0.03  # fraction of the MACs; depthwise layers take a several times larger fraction of the time
LARGE_TABLES = 0.1  # fraction of the parameters in tables of embeddings, which static schemes leave in float


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A step for the recipe, or the reason why there is none.

    Attributes:
        table: the step as a table of the recipe; None if it is left out.
        line: what the step does, for the reasons.
        omission: the kind of step and why it is left out, for the reasons; empty if that needs no mention.
    """

    table: Document | None = None
    line: str = ""
    omission: str = ""


def _training(schooling: Schooling, epochs: int, rates: tuple[float, float]) -> Document:
    """The table of a training step, with a range for the learning rate."""
    assert schooling.table is not None
    head = {"do": schooling.table["do"], "epochs": epochs, "lr": {"search": list(rates), "log": True}}
    return head | schooling.table


def prune_step(mix: Mix, schooling: Schooling, budget: Budget) -> Proposal:
    """Channel pruning, by MACs if they or the latency count, else by parameters."""
    of = "macs" if {"latency", "macs"} & set(budget.figures) else "params"
    if mix.stays:
        return Proposal(omission=f"pruning (no channels may go: {mix.stays})")
    share = mix.removable[of]
    if share < WORTH_PRUNING:
        return Proposal(omission=f"pruning (channels that may go hold {share:.0%} of the {words(of)})")
    table: Document = {"do": "prune", "pattern": "channel", "of": of}
    high = down(0.85 * share)
    if schooling.table is None:
        if not mix.recalibrates:
            return Proposal(
                omission="pruning (nothing would mend the cut: no training, and no batch norm to recalibrate)"
            )
        # a search starts with the first choice: skip, since without training pruning seldom pays
        low, high = max(0.05, up(mix.smallest[of])), min(0.25, high)
        table |= {"sparsity": {"search": [low, high]} if low < high else low, "skip": {"search": [True, False]}}
        line = f"a few {_channel_word(mix)} may go, as only batch norms can be calibrated again"
        return Proposal(table=table, line=line)
    high = min(0.8, high)
    low = max(0.2 if high >= 0.4 else 0.05, up(mix.smallest[of]))  # less would remove no channel
    high = max(low, high)
    table |= {"sparsity": {"search": [low, high]} if low < high else low, "skip": {"search": [False, True]}}
    if mix.main == "convolution":
        table |= {"criterion": "lamp", "normalization": "max"}
    line = f"remove {_channel_word(mix)} with {low:.0%} to {high:.0%} of the {words(of)}"
    return Proposal(table=table, line=line)


def _channel_word(mix: Mix) -> str:
    """Name of the channels of the model's main family of layers."""
    if mix.main == "attention":
        return "heads and neurons" if mix.shares["attention"] else "neurons"
    return "units" if mix.main == "recurrent" else "channels"


def training_step(mix: Mix, schooling: Schooling) -> Proposal:
    """The training after pruning."""
    if schooling.table is None:
        return Proposal(omission=f"training ({schooling.about})")
    rates = (2e-5, 2e-4) if mix.shares["attention"] else (2e-4, 2e-3)
    how = "teach it by the original" if schooling.table["do"] == "distill" else "train it on the labels"
    return Proposal(table=_training(schooling, schooling.epochs, rates), line=f"{how} for {schooling.epochs} epochs")


def quantize_step(mix: Mix, schooling: Schooling, budget: Budget, runtimes: Sequence[str]) -> Proposal:
    """Quantization with the schemes that suit the runtimes; trained for convolutions, else plain or corrected."""
    figures = set(budget.figures)
    if not figures & {"latency", "size", "peak_memory"}:
        return Proposal(omission="quantization (it changes neither MACs nor parameters)")
    schemes = _schemes(mix, budget, runtimes)
    table: Document = {"do": "quantize", "scheme": schemes[0] if len(schemes) == 1 else {"search": schemes}}
    line = f"quantize to {' or '.join(schemes)}"
    if mix.main == "convolution" and schooling.table is not None and "int8-dynamic" not in schemes:
        rates = (2e-5, 5e-4)
        table |= {"mode": "qat", "train": _training(schooling, max(1, schooling.epochs // 3), rates)}
        line += ", trained on its grid"
    else:
        table["accuracy"] = {"search": ["plain", "best"]}
        line += ", plainly or with GPTQ and corrected biases"
    if "int8" in schemes and mix.tables >= LARGE_TABLES:
        table["layers"] = {"type:Embedding": "int8-weights"}
        line += f", and the tables of embeddings ({mix.tables:.0%} of the parameters) to int8"
    on_integers = all(SCHEMES[scheme].activations != "float" for scheme in schemes)
    if "latency" in figures and on_integers and "layers" not in table:
        table |= {"layers": "auto", "by": "latency"}
        line += ", with layers in float that are faster there"
    if "latency" in figures and not any(SCHEMES[scheme].activations != "float" for scheme in schemes):
        line += " (fewer bytes at the speed of float: nothing here computes it on integers)"
    elif "latency" in figures and (saturates() or mix.shares["depthwise"] > MANY_DEPTHWISE):
        table["skip"] = {"search": [False, True]}
        line += ", or not at all: " + (
            "8 bits gain little without VNNI" if saturates() else "depthwise layers may lose more by conversions"
        )
    return Proposal(table=table, line=line)


def _schemes(mix: Mix, budget: Budget, runtimes: Sequence[str]) -> list[str]:
    """Schemes that are worth a trial, in the order in which a search starts with them."""
    if "latency" not in budget.figures:  # only weights are stored, and float activations lose less accuracy
        return ["int8-weights", "int4-weights"]
    best = {scheme: max(mix.runs[name][scheme] for name in runtimes) for scheme in SCHEMES}
    schemes = [scheme for scheme in ("int8", "int8-dynamic") if best[scheme] >= MOST]
    if not schemes or mix.main == "recurrent":
        schemes.append("int8-weights")
    if "size" in budget.bounds and "latency" not in budget.bounds:
        schemes.append("int4-weights")
    return schemes
