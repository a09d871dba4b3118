"""Every method on every kind of base: attached, trained, saved, exported, reloaded where modmoe is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modmoe.exports.converted import export
from tests.support.adapted import CASES, FAMILIES, adapted_model, base_model, logits_of, token_ids, train

CHILD = """
import importlib.abc, json, sys
from pathlib import Path

class NoModmoe(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "modmoe":
            raise ImportError(name)

sys.meta_path.insert(0, NoModmoe())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

root, ids = Path(sys.argv[1]), torch.tensor(json.loads(sys.argv[2]))
found = {}
for directory in sorted(root.glob("*-tied")):
    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        found[directory.name.removesuffix("-tied")] = model(input_ids=ids).logits
    found[directory.name.removesuffix("-tied") + " tokens"] = model.generate(
        input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
save_file(found, root / "found.safetensors")
"""


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the logits and tokens of every case, in memory and from a process that cannot import modmoe."""
    root = tmp_path_factory.mktemp("matrix")
    for family in FAMILIES:
        base_model(family).save_pretrained(root / f"{family}-base")
    wanted = {}
    for method, family in CASES:
        name = f"{method}-{family}"
        model = adapted_model(method, family, trained=False)
        # as loading from the directory would have it
        model.peft_config["default"].base_model_name_or_path = str(root / f"{family}-base")
        train(model)
        model.save_pretrained(root / name)
        wanted[name] = logits_of(model)
        wanted[f"{name} tokens"] = model.generate(
            input_ids=token_ids(), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        export(str(root / name), str(root / f"{name}-tied"), form="tied", verify=False)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "code")}
    command = [sys.executable, "-P", "-c", CHILD, str(root), json.dumps(token_ids().tolist())]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return wanted, load_file(Path(root) / "found.safetensors")


@pytest.mark.parametrize(("method", "family"), CASES)
def test_trained_saved_exported_and_reloaded_without_modmoe_is_the_same(matrix, method, family):
    wanted, found = matrix
    name = f"{method}-{family}"
    start = logits_of(base_model(family))

    assert (wanted[name] - start).abs().max() > 1e-3, "training changed nothing, so nothing is compared"
    torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[f"{name} tokens"], wanted[f"{name} tokens"])
