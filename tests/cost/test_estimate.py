"""The estimate of a dry run: each term grows with what it is of, and what does not fit says so."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import modmoe
from modmoe.cli.main import run
from modmoe.cost.devices import DEVICES, Device, find_device
from modmoe.cost.formulas import (
    PROCESS_BYTES,
    START_S,
    Sizes,
    estimate_convert,
    estimate_finetune,
    forward_flops,
    sizes_of,
)
from modmoe.models.loading import skeleton
from modmoe.recipe.schema import FinetuneRecipe, Recipe, make_recipe
from tests.support import moes, tiny

# Llama-3.1-8B
LARGE = Sizes(
    parameters=8_030_261_248,
    body=6_979_588_096 + 4096,
    head=128256 * 4096,
    layer=218_112_000,
    layers=32,
    width=4096,
    neurons=14336,
    queries=4096,
    keys=1024,
    vocabulary=128256,
    itemsize=2,
)
GPU = DEVICES["h100-80gb"]
CPU = dataclasses.replace(DEVICES["m2-16gb"], memory_bytes=64 * 10**9)


def recipe(**changes: Any) -> Recipe:
    return make_recipe({"tasks": {"a": "a.txt", "b": "b.txt"}, "partition.num_modules": 16, **changes})


def compute_s(need: Any) -> float:
    return sum(need.low_s[bound] for bound in ("compute", "memory bandwidth") if bound in need.low_s)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
def test_sizes_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    source = tiny.save_dense(tmp_path / "dense", name)
    model = tiny.dense_model(name)
    sizes = sizes_of(skeleton(source))
    assert sizes.parameters == sum(weight.numel() for weight in model.parameters())
    assert (sizes.layers, sizes.width, sizes.neurons) == (2, 32, tiny.NEURONS)
    assert sizes.head == tiny.VOCABULARY * 32 == sizes.vocabulary * 32
    # all but the rows that are looked up
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert sizes.body == sizes.parameters - (1 if is_tied else 2) * tiny.VOCABULARY * 32
    assert sizes.outside == sizes.parameters - 2 * sizes.layer


def test_a_token_of_a_mixture_meets_the_experts_that_it_has(tmp_path: Path) -> None:
    source = moes.save_moe(tmp_path / "moe", "mixtral", num_local_experts=8, num_experts_per_tok=2)
    sizes = sizes_of(skeleton(source))
    routed = sum(w.numel() for name, w in skeleton(source).named_parameters() if ".experts." in name)
    assert routed > 0
    assert sizes.parameters - sizes.body - routed * 6 // 8 == sizes.parameters - sizes_all(source)


def sizes_all(source: Path) -> int:
    """Return the parameters that are no rows of a table."""
    model = skeleton(source)
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return sum(weight.numel() for weight in model.parameters() if id(weight) not in tables)


@pytest.mark.parametrize("device", [GPU, CPU], ids=lambda device: device.name)
def test_twice_the_tokens_are_twice_the_passes(device: Device) -> None:
    once, twice = (
        estimate_convert(recipe(**{"calibration.tokens": tokens, "router.routing": "task"}), LARGE, device)
        for tokens in (2**17, 2**18)
    )
    assert compute_s(twice) == pytest.approx(2 * compute_s(once), rel=1e-6)
    assert forward_flops(LARGE, 200, 64, has_head=False) == 2 * forward_flops(LARGE, 100, 64, has_head=False)
    # what is held is a batch and sums, however long the text
    assert twice.device_bytes == once.device_bytes


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"router.routing": "token"}, 1),
        ({"router.compensation": True}, 1),
        ({"assignment.score": "output_norm"}, 1),
        ({"assignment.method": "greedy"}, 2),
        ({"assignment.method": "greedy", "router.compensation": True}, 3),
    ],
)
def test_every_pass_over_the_text_counts(changes: dict[str, Any], more: int) -> None:
    base = {"router.routing": "task", "calibration.tokens": 2**20}
    one, several = (estimate_convert(recipe(**{**base, **other}), LARGE, CPU) for other in ({}, changes))
    # besides its passes, each does a few products for the rows it keeps, or the down projections of all tokens
    assert 1 + more <= compute_s(several) / compute_s(one) < 1 + more + 0.4


def test_a_model_over_half_of_the_memory_is_run_layer_by_layer() -> None:
    whole, layer = (estimate_convert(recipe(), LARGE, DEVICES[name]) for name in ("a100-40gb", "rtx-4090"))
    assert whole.device_bytes > LARGE.num_bytes > 3 * layer.device_bytes
    forced = estimate_convert(recipe(**{"calibration.by_layer": False}), LARGE, DEVICES["rtx-4090"])
    assert forced.device_bytes > LARGE.num_bytes
    gradients = estimate_convert(recipe(**{"assignment.score": "taylor"}), LARGE, DEVICES["rtx-4090"])
    assert gradients.device_bytes > forced.device_bytes


def test_what_learns_has_a_gradient_and_two_moments_and_the_rest_has_none() -> None:
    tiny_batch = FinetuneRecipe(batch_size=1, sequence_length=1)
    full = estimate_finetune(tiny_batch, LARGE, CPU, trainable=LARGE.parameters)
    router = estimate_finetune(dataclasses.replace(tiny_batch, train="router"), LARGE, CPU, trainable=1000)
    rest = PROCESS_BYTES["finetune"]
    assert full.host_bytes - rest == pytest.approx(16 * LARGE.parameters, rel=1e-3)
    assert router.host_bytes - rest == pytest.approx(4 * LARGE.parameters, rel=1e-3)
    adapters = dataclasses.replace(tiny_batch, train="adapters")
    frozen = estimate_finetune(adapters, LARGE, CPU, trainable=10**6)
    assert frozen.host_bytes - rest == pytest.approx(2 * LARGE.parameters, rel=1e-2)
    # backward to the activations alone is a third less
    assert compute_s(full) > compute_s(router)
    long = FinetuneRecipe(batch_size=32, sequence_length=1024)
    flops = [
        compute_s(estimate_finetune(dataclasses.replace(long, train=train), LARGE, CPU, trainable=count))
        for train, count in (("full", LARGE.parameters), ("router", 1000))
    ]
    assert flops[1] / flops[0] == pytest.approx(2 / 3, rel=0.05)


def test_activations_grow_with_the_batch_and_a_teacher_is_held_beside() -> None:
    needs = [
        estimate_finetune(FinetuneRecipe(batch_size=batch), LARGE, CPU, trainable=LARGE.parameters).host_bytes
        for batch in (256, 512, 1024)
    ]
    # pieces of the logits' float32 copies are of one size
    assert needs[2] - needs[1] == 2 * (needs[1] - needs[0])
    wanted = FinetuneRecipe(batch_size=256)
    taught = estimate_finetune(wanted, LARGE, CPU, trainable=LARGE.parameters, teacher=LARGE)
    assert taught.host_bytes - needs[0] > 4 * LARGE.parameters


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_is_whole_and_found_by_its_name(name: str) -> None:
    device = find_device(name.upper())
    assert device is DEVICES[name]
    assert device.memory_bytes >= 10**10 and device.bfloat16_flops > device.bandwidth
    need = estimate_convert(recipe(), LARGE, device)
    low_s, high_s = sum(need.low_s.values()), sum(need.high_s.values())
    assert START_S[0] < low_s < high_s < math.inf


def test_this_machine_is_measured() -> None:
    device = find_device("cpu")
    assert device.is_cpu and device.cores >= 1 and device.memory_bytes > 10**8
    assert device.float32_flops > 1e8 and device.bfloat16_flops > 1e7


@pytest.mark.parametrize(
    ("shown", "memory_gb", "name"),
    [
        ("NVIDIA GeForce RTX 4090", 24, "rtx-4090"),
        ("NVIDIA GeForce RTX 3060", 12, "rtx-3060-12gb"),
        ("NVIDIA A100-SXM4-80GB", 85, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 42, "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", 85, "h100-80gb"),
        ("NVIDIA H200", 150, "h200"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA L40S", 48, "l40s"),
        ("Some other GPU", 8, "cpu"),
    ],
)
def test_a_gpu_that_is_here_is_known_by_what_torch_calls_it(
    shown: str, memory_gb: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        total_memory = memory_gb * 10**9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: shown)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert find_device("auto").name == name


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_dense(tmp_path_factory.mktemp("source") / "dense")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny.write_tasks(tmp_path_factory.mktemp("tasks"), rows=3)


def plan(dense: Path, tasks: dict[str, str], **keywords: Any) -> dict[str, Any]:
    return modmoe.convert(dense, "never", tasks=tasks, num_modules=8, dry_run=True, **keywords)


def test_what_does_not_fit_says_what_does(dense: Path, tasks: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(GPU, name="small", memory_bytes=580_000_000)
    monkeypatch.setattr("modmoe.cost.estimate.find_device", lambda _: small)
    keywords = {"finetune.batch_size": 512, "finetune.max_steps": 10, "finetune.train": "full"}
    need = plan(dense, tasks, **keywords)["estimate"]["finetune"]
    assert not need["fits"] and need["device_bytes"] > small.memory_bytes
    assert need["verdict"].startswith("does not fit: about ")
    lowered = int(need["verdict"].partition("lower finetune.batch_size to ")[2].split(",")[0])
    # it is the largest that does
    for size, fits in ((lowered, True), (2 * lowered, False)):
        keywords["finetune.batch_size"] = size
        assert plan(dense, tasks, **keywords)["estimate"]["finetune"]["fits"] is fits
    monkeypatch.setattr("modmoe.cost.estimate.find_device", lambda _: dataclasses.replace(small, memory_bytes=1))
    verdict = plan(dense, tasks)["estimate"]["convert"]["verdict"]
    assert verdict.endswith("; take t4")


@pytest.mark.parametrize("train", ["full", "lora", "router"])
def test_training_is_planned_with_what_learns(train: str, dense: Path, tasks: dict[str, str], tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    modmoe.convert(dense, moe, tasks=tasks, num_modules=8, tokens=300)
    planned = modmoe.finetune(
        moe, tmp_path / "out", tasks=tasks, train=train, max_steps=2, batch_size=2, dry_run=True, estimate_for="l4"
    )
    assert not (tmp_path / "out").exists()
    assert planned["estimate"]["finetune"]["fits"] and planned["device"] == "l4"
    trained = modmoe.finetune(moe, tmp_path / "out", tasks=tasks, train=train, max_steps=2, batch_size=2)
    assert planned["parameters"]["total"] == trained["parameters"]["total"]
    assert planned["parameters"]["trainable"] == trained["parameters"]["trainable"]


def test_the_flag_reads_for_people_and_for_programs(
    dense: Path, tasks: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["convert", str(dense), str(tmp_path / "out"), "--num-modules", "8", "--dry-run"]
    words += [f"--task={name}={file}" for name, file in tasks.items()]
    assert run([*words, "--estimate-for", "RTX-4090"]) == 0
    out, _ = capsys.readouterr()
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines() if line.startswith("  convert.")}
    assert lines["convert.memory"].startswith("about ") and "of 24 GB on rtx-4090" in lines["convert.memory"]
    assert lines["convert.time"].startswith("about ") and lines["convert.verdict"] == "fits"
    assert run([*words, "--json"]) == 0  # this machine's
    result = json.loads(capsys.readouterr()[0])
    need = result["estimate"]["convert"]
    assert result["device"] in ("cpu", *DEVICES) and need["seconds_high"] > need["seconds_low"] > 0
    assert need["fits"] is (need["device_bytes"] <= result["device_memory_bytes"])
    assert "finetune" not in result["estimate"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--dry-run", "--estimate-for", "rtx4090"],
            f"known are auto, cpu, {', '.join(DEVICES)}. Did you mean 'rtx-4090'?",
        ),
        (["--estimate-for", "l4"], "--estimate-for: belongs to --dry-run; add that."),
    ],
)
@pytest.mark.parametrize("command", ["convert", "finetune"])
def test_a_flag_that_cannot_be_meant_is_refused_in_one_line(
    command: str, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "nowhere", "out", "--task", "a=a.txt", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1
