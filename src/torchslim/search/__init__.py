"""The best recipes under a budget: what may vary, how candidates are tried, and which of them are worth their cost."""

from torchslim.search.front import Verdict
from torchslim.search.outcome import Member, SearchResult
from torchslim.search.run import search
from torchslim.search.space import Space, make_space

__all__ = ["Member", "SearchResult", "Space", "Verdict", "make_space", "search"]
