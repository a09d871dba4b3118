"""Load an export with plain transformers and write what it computes; run as a script in a process of its own.

``python reload.py JOB`` reads a JSON job (see ``modmoe.formats.proof.verify``) and imports torch, transformers and
nothing of modmoe: an import of it fails, as it does for whoever downloads the export. Only for a job that names a base
model is the export an adapter, which is loaded as its users do, with peft and ``import modmoe.adapters``.
"""

# Shapes: B batch, T tokens, G tokens generated, V vocabulary

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig


class _NoModmoe(MetaPathFinder):
    """Refuses imports of modmoe, installed or not."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Raise ImportError for modmoe and what lies in it; find nothing else."""
        if fullname.partition(".")[0] == "modmoe":
            raise ImportError(f"'{fullname}' is imported where only the checkpoint's own code may run")


def compute(model: Any, ids_BT: Tensor, new_tokens: int, dtypes: Sequence[torch.dtype]) -> list[tuple[Tensor, Tensor]]:
    """Return, for each dtype, the logits_BTV of a model and the tokens_BG that it goes on with, always the likeliest.

    ``model`` is cast, so ``dtypes`` must not become narrower; it comes in the first.
    """
    model.eval()
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # one that lies beside the weights may sample or stop
    mask_BT = torch.ones_like(ids_BT)
    computed = []
    for dtype in dtypes:
        # a cast to the type that it has already would round what transformers keeps wider, such as rotary frequencies
        model = model if dtype == dtypes[0] else model.to(dtype)
        with torch.no_grad():
            logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            written = model.generate(
                input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        computed.append((logits_BTV, written[:, ids_BT.shape[1] :]))
    return computed


def load_with_peft(job: dict[str, Any], dtype: torch.dtype) -> Any:
    """Return the job's adapter on its base model, as PEFT loads it."""
    from peft import PeftModel

    import modmoe.adapters  # noqa: F401 (makes the methods known to peft)
    from modmoe.models.loading import (
        load,  # the base model may be a tied one, and transformers has no class for those
    )

    base = load(job["base"], dtype=dtype, device="cpu", trust_remote_code=job["options"]["trust_remote_code"])
    return PeftModel.from_pretrained(base, job["directory"], torch_device="cpu")


def main(job_file: str) -> None:
    """Run the job; keep logits and tokens of each dtype in one safetensors file."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    dtypes = [getattr(torch, name) for name in job["dtypes"]]
    if job["base"] is None:
        sys.meta_path.insert(0, _NoModmoe())
        model: Any = AutoModelForCausalLM.from_pretrained(job["directory"], dtype=dtypes[0], **job["options"])
    else:
        model = load_with_peft(job, dtypes[0])
    if job["expert"] is not None:
        model.set_expert(job["expert"])
    made: dict[str, Tensor] = {}
    computed = compute(model, torch.tensor(job["input_ids"]), job["new_tokens"], dtypes)
    for name, (logits_BTV, tokens_BG) in zip(job["dtypes"], computed, strict=True):
        made[f"{name}.logits"], made[f"{name}.tokens"] = logits_BTV.contiguous(), tokens_BG.contiguous()
    assert job["base"] is not None or not any(name.partition(".")[0] == "modmoe" for name in sys.modules)
    save_file(made, job["output"])


if __name__ == "__main__":
    main(sys.argv[1])
