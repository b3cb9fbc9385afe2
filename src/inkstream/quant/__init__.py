"""Number formats for quantised weights. Pure functions over tensors; they do not know files or model modules."""

from typing import Literal

QuantName = Literal[
    "fp8", "int8", "w8a8", "nf4", "int4",
    "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k",
    "bf16", "fp16",
]  # fmt: skip
"""Formats that `--quant` offers. Names that begin with q are GGUF's formats. Importing this needs no torch."""
