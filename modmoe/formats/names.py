"""What can be asked of an export, by name: its forms, the programs that it is for, the types of its weights."""

from __future__ import annotations

FORMS = ("tied", "packed", "native", "dense", "adapter")
"""Forms of an export."""
CLIENTS = ("transformers", "vllm", "sglang", "llama.cpp")
"""Programs that a native export can be for."""
DTYPES = ("bfloat16", "float16", "float32")
"""Types that an export's weights can be cast to; torch has them under these names."""
