"""Start, stop and probe worker processes. Knows the worker contract, not what a worker computes."""
