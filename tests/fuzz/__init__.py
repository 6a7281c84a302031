"""A differential fuzzer: random ops under random stacks of modes, held against their bodies in plain eager PyTorch."""
