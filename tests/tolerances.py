"""The one tolerance table: calibrated once, then held.

Absolute differences of natural-logarithm probabilities, unless a name says relative. Ids, plans and anything
promised bit for bit are compared exactly and have no entry here.
"""

from types import MappingProxyType

# Between two runs of ours that may add in another order (groups pre-reduced, batch mates, chunking).
LOGPROB_BY_DTYPE = MappingProxyType({"float32": 1e-4, "bfloat16": 0.05})

# Between logprobs served over HTTP in float32 and transformers' own model in float32.
LOGPROB_OVER_HTTP_AGAINST_TRANSFORMERS = 1e-3

# max |kernel - fp32 reference| / max |fp32 reference|.
KERNEL_RELATIVE_ERROR = 2e-3

# |sum over FP8 on the wire - fp32 sum| / |fp32 sum| of a layer: e4m3 has three bits of mantissa (0.03 found).
FP8_WIRE_RELATIVE_ERROR = 0.06

# float32 formulas against the same formulas written by someone else (gate weights, rotary tables).
FLOAT32_RELATIVE_ERROR = 1e-5
