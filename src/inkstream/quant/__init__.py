"""Number formats: weights in fewer bits. Pure functions over tensors that know no file and no module."""

from typing import Literal

QuantName = Literal[
    "fp8", "int8", "w8a8", "nf4", "int4",
    "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k",
    "bf16", "fp16",
]  # fmt: skip
"""What a model's weights can be packed as; those with a q are GGUF's. Importable without torch."""
