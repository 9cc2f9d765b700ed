"""Search for the best recipes under a budget: search spaces, trials, and the Pareto front of their results."""

from torchslim.tuning.pareto import Verdict
from torchslim.tuning.result import Member, SearchResult
from torchslim.tuning.search_loop import search
from torchslim.tuning.space import Space, make_space

__all__ = ["Member", "SearchResult", "Space", "Verdict", "make_space", "search"]
