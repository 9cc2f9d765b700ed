"""torchslim."""
from torchslim.task import Task
