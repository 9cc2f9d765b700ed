"""Search recipes of the toy model, as text: a test replaces what it looks at."""

from __future__ import annotations

NAMES = 'model = "tests.support.toy:model"\ntask = "tests.support.toy:task"\n'
SPACE = f"""{NAMES}
runtime = {{ search = ["onnxruntime", "eager"] }}
[budget]
metric_drop = 1.0
[[step]]
do = "prune"
skip = {{ search = [true, false] }}
sparsity = {{ search = [0.2, 0.8] }}
[[step]]
do = "distill"
epochs = {{ search = [1, 8], log = true }}
lr = {{ search = [1e-4, 1e-2], log = true }}
response = {{ search = [{{ do = "kd", alpha = 0.9 }}, {{ do = "dkd" }}, {{ do = "kd", temperature = 2.0 }}] }}
[[step]]
do = "quantize"
scheme = {{ search = ["int8", "int8-weights"] }}
layers = {{ head = {{ search = ["int8", "float"] }} }}
"""
"""Of every kind of range; for tests that parse it."""

QUICK = f"""{NAMES}
threads = 1
seed = 1
[[step]]
do = "prune"
skip = {{ search = [true, false] }}
pattern = "channel"
sparsity = {{ search = [0.1, 0.6] }}
round_to = 2
min_channels = 2
[[step]]
do = "distill"
epochs = 2
[[step]]
do = "quantize"
scheme = {{ search = ["int8", "int8-weights"] }}
[budget]
metric_drop = 90.0
minimize = ["metric_drop", "size"]
trials = 4
finalists = 1
"""
"""Takes seconds; for tests that run it."""
