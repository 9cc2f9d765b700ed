"""The best recipes under a budget: what may vary, how candidates are tried, and which of them are worth their cost."""

from torchslim.tuning.pareto import Verdict
from torchslim.tuning.result import Member, SearchResult
from torchslim.tuning.search_loop import search
from torchslim.tuning.space import Space, make_space

__all__ = ["Member", "SearchResult", "Space", "Verdict", "make_space", "search"]
