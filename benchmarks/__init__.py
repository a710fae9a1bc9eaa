"""How fast the operators are, beside eager PyTorch, torch.compile and PyTorch's fused attention.

`python -m benchmarks` measures, writes benchmarks/results/<device>/<operator>.json and prints the
table; `python -m benchmarks.report` renders the README's tables from those files.
"""
