"""Every tolerance of the test-suite, each with its reason.  No other file may hold one.

u is the unit roundoff, 2^-p for p significant bits: float32 24, float16 11, bfloat16 8.
"""

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

#: Weight of the score's own rounding (``OracleResult.score_scale``) against the sum's (``OracleResult.scale``).  Scores
#: are float32 in every dtype, so their terms carry 2^-24 where the sum carries u: the weight is 2^-24 / u, times 4 for
#: the order of summation.
SCORE_WEIGHT = {dtype: min(1.0, 4 * 2.0**-24 / u) for dtype, u in UNIT_ROUNDOFF.items()}

#: |diff| / (|A| @ |V| + weight * score_scale) of a kernel with float32 sums: the weight and the output are rounded once
#: each (2 u); float32 also rounds every partial sum and exp2 (about 16 u at the lengths tested).
COMPONENTWISE = {"float32": 32 * 2.0**-24, "float16": 3 * 2.0**-11, "bfloat16": 3 * 2.0**-8}

#: max |diff| / rms(reference): the largest element is up to about ten times the rms on normal data.
RMS = {dtype: 10 * bound for dtype, bound in COMPONENTWISE.items()}

#: House rule 3.7: at most twice the error of plain low-precision PyTorch.
LOW_PRECISION_FACTOR = 2.0

#: However bad low-precision PyTorch is on a case, an output that is 5 % off is wrong: 0.9x must always fail.
LARGEST_COMPONENTWISE = 0.04
LARGEST_RMS = 0.4

#: Two float64 implementations of the same formula differ by rounding only.
FLOAT64 = 1e-12

#: Absolute error that the type itself forces on tiny values: one step of float16's subnormals (half a step each for the
#: weight, whose sum is divided by about its length, and for the output).  The other types' subnormals are below 1e-38.
#: An element that must be exactly 0 gets no such allowance.
SUBNORMAL_STEP = {"float32": 0.0, "float16": 2.0**-24, "bfloat16": 0.0}

#: Absolute error that float32 arithmetic forces on products with a sigmoid far below zero: it ends at 2^-126, where
#: GPUs flush to zero, and 1 + exp2 overflows at 2^-128; times the value that is multiplied, at most 8 in the cases.
FLOAT32_UNDERFLOW = 8 * 2.0**-126
