"""Everything that needs a GPU, in one command: are the kernels right, then how fast they are.

`python -m benchmarks.gpu` runs four stages, each of them in processes of its own and within its
share of one time limit:

    correctness     the tests of traps against float64, forward and backward
    sanitizer       compute-sanitizer's four tools on small shapes
    repeatability   the same bits in 100 runs, in a captured graph too
    timings         CUDA, Triton and the baselines in turn; goals and what was reached

Results go to benchmarks/results/<gpu>/: timings as <operator>.json, everything else as
checks/<stage>.json. A stage that fails or runs out of time is recorded, and the next one goes on.
"""
