"""Adapters under trainers: TRL's trainer trains and resumes them, and two processes train what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from modmoe.adapters import CONFIGS
from tests.support.adapted import (
    BALANCED,
    adapted_model,
    adapter_parameters,
    config_for,
    context,
    from_config,
    logits_of,
    settings_of,
    with_balance,
)
from tests.support.tiny import VOCABULARY, tokenizer

STEPS = 6


def trainer_of(directory: Path, method: str, family: str, **more: Any) -> SFTTrainer:
    """Return TRL's trainer, which attaches the adapter itself, on a fresh model and fixed rows."""
    torch.manual_seed(0)
    special = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    model = from_config(family, vocab_size=VOCABULARY, **special)
    dropout = {name: 0.1 for name in ("lora_dropout", "dropout") if name in settings_of(method)}
    arguments = SFTConfig(
        output_dir=str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=STEPS // 2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"activation_checkpointing": False, **more},
    )
    rows = [{"prompt": f"{number} + {number} = ", "completion": f"{2 * number} in all"} for number in range(16)]
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=config_for(method, **dropout, **with_balance(method)),
    )


def adapter_of(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in adapter_parameters(trainer.model)}


@pytest.mark.parametrize(
    ("method", "family"),
    [("comol", "llama"), ("ldmole", "llama"), ("mixlora", "qwen3"), ("perft_r", "olmoe"), ("perft_e", "olmoe")],
)
def test_trl_trains_an_adapter_and_resumes_it_bit_for_bit(method: str, family: str, tmp_path: Path) -> None:
    unbroken = trainer_of(tmp_path, method, family)
    start, frozen = adapter_of(unbroken), unbroken.model.get_base_model().lm_head.weight.clone()
    unbroken.train()
    expected = adapter_of(unbroken)
    stuck = [name for name, weight in expected.items() if torch.equal(weight, start[name])]
    assert not stuck
    assert torch.equal(unbroken.model.get_base_model().lm_head.weight, frozen)
    assert (context(unbroken.model).loss is not None) == (method in BALANCED)

    resumed = trainer_of(tmp_path, method, family)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    found = adapter_of(resumed)
    assert resumed.state.global_step == STEPS and found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (unbroken, resumed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS

    base = resumed.model.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / f"checkpoint-{STEPS}")
    assert torch.equal(logits_of(loaded), logits_of(unbroken.model))


@pytest.mark.parametrize(("method", "family"), [("perft_r", "olmoe"), ("mixlora", "llama")])
def test_trl_trains_the_same_under_checkpointing(method: str, family: str, tmp_path: Path) -> None:
    weights, losses = [], []
    for on in (False, True):
        trainer = trainer_of(tmp_path / str(on), method, family, activation_checkpointing=on, save_strategy="no")
        trainer.train()
        weights.append(adapter_of(trainer))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


def test_two_processes_train_what_one_does(repository: Path) -> None:
    script = repository / "tests" / "support" / "adapted_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found.keys() == CONFIGS.keys()
    assert sum("fsdp" in "".join(differences) for differences in found.values()) >= 9
    for method, differences in found.items():
        assert differences.pop("moved") > 1e-4, method
        assert differences and max(differences.values()) < 2e-6, (method, differences)


def test_a_step_moves_every_parameter_of_the_balanced_methods() -> None:
    """What one rank of a distributed run would leave out, the others would wait for."""
    for method in BALANCED:
        model = adapted_model(method, "llama", **with_balance(method)).train()
        ids_BT = torch.randint(3, 64, (1, 2))
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        assert all(weight.grad is not None for _, weight in adapter_parameters(model)), method
