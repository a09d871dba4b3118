"""Experts pruned and merged equal the plain loop: scores, clusters, and the checkpoint that is written."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import modmoe
from modmoe.analysis.text.calibration import Batch
from modmoe.conversion import driver
from modmoe.conversion.reduce_experts import reduction, steps
from modmoe.conversion.reduce_experts.statistics import ExpertStats, measure_experts
from modmoe.errors import CheckpointError, ExportError, RecipeError
from modmoe.formats.proof import reload, verify
from modmoe.models.inspection import inspect
from modmoe.models.loading import load
from modmoe.recipe.schema import ExpertsRecipe, load_recipe, make_recipe
from modmoe.storage.checkpoint import MANIFEST, Checkpoint, read_config
from tests import reference_experts
from tests.support import moes, tied, tiny

FAMILIES = sorted(moes.CONFIGS)
LEFT = 3
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
SEQUENCES = [tiny.token_ids(1, length, seed=length)[0].tolist() for length in (3, 11, 1, 6, 9, 5)]


def batches(size: int) -> dict[str, list[Batch]]:
    """The sequences as two tasks, padded on the right."""

    def pad(sequences: list[list[int]]) -> Batch:
        longest = max(map(len, sequences))
        ids = torch.tensor([sequence + [258] * (longest - len(sequence)) for sequence in sequences])
        mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
        return Batch(ids, mask)

    cut = [SEQUENCES[:3], SEQUENCES[3:]]
    return {
        name: [pad(part[start : start + size]) for start in range(0, len(part), size)]
        for name, part in zip(("one", "two"), cut, strict=True)
    }


@functools.cache
def measured(model_type: str) -> tuple[dict[int, ExpertStats], dict[int, dict[str, Any]]]:
    """What is measured, padded and in batches, and what the loop finds."""
    model = moes.moe_model(model_type).double()
    found = measure_experts(model, batches(4), outputs=True)
    return found, {layer: reference_experts.measure(model, layer, SEQUENCES) for layer in moes.SPARSE[model_type]}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("score", sorted(set(reduction.SCORES) - {"random"}))
def test_a_score_is_that_of_the_loop(model_type: str, score: str) -> None:
    found, wanted = measured(model_type)
    assert found.keys() == wanted.keys()
    for layer, stats in found.items():
        loop = wanted[layer]
        by_hand = [reference_experts.score(score, *pair) for pair in zip(loop["gates"], loop["norms"], strict=True)]
        torch.testing.assert_close(
            reduction.SCORES[score](stats, 0), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-6, atol=1e-9
        )
        ranking = sorted(range(moes.EXPERTS), key=lambda expert: -by_hand[expert])
        choice = reduction.choose(stats, ExpertsRecipe(num_experts=LEFT, score=score), 0)
        assert [group for (group,) in choice.groups] == sorted(ranking[:LEFT])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_clusters_are_those_of_the_loop(model_type: str) -> None:
    found, wanted = measured(model_type)
    for layer, stats in found.items():
        assert stats.output_ED is not None
        means = wanted[layer]["means"]
        torch.testing.assert_close(stats.output_ED / stats.tokens, torch.stack(means).double(), rtol=1e-6, atol=1e-9)
        for left in (1, 2, 4, moes.EXPERTS):
            choice = reduction.choose(stats, ExpertsRecipe(num_experts=left, assignment="merge"), 0)
            assert sorted(map(list, choice.groups)) == reference_experts.clusters(means, left)
            counts = [len(norms) for norms in wanted[layer]["norms"]]
            for group, shares in zip(choice.groups, choice.shares, strict=True):
                total = sum(counts[expert] for expert in group)
                even = [1 / len(group)] * len(group)
                assert shares == pytest.approx([counts[e] / total for e in group] if total else even)


def test_clusters_of_any_outputs_are_those_of_the_loop() -> None:
    ones = torch.ones(9, dtype=torch.float64)
    for seed in range(12):
        means = torch.randn(9, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        stats = ExpertStats(torch.tensor(2.0, dtype=torch.float64), ones, ones, ones, ones, 2 * means)
        for left in (2, 3, 5):
            choice = reduction.choose(stats, ExpertsRecipe(num_experts=left, assignment="merge"), 0)
            assert sorted(map(list, choice.groups)) == reference_experts.clusters(list(means), left)


def test_padding_and_batches_do_not_move_a_sum() -> None:
    model = moes.moe_model("qwen2_moe").double()
    one, many = (measure_experts(model, batches(size), outputs=True) for size in (1, 4))
    for layer in one:
        for field in dataclasses.fields(ExpertStats):
            torch.testing.assert_close(
                getattr(one[layer], field.name), getattr(many[layer], field.name), rtol=1e-6, atol=1e-9
            )
    assert one[0].tokens == sum(map(len, SEQUENCES))
    assert int(one[0].count_E.sum()) == moes.TOP_K * sum(map(len, SEQUENCES))


def test_experts_that_no_token_goes_to_are_last_and_count_alike() -> None:
    some = torch.tensor([0.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    output_ED = torch.tensor([[0.0], [9.0], [0.1], [9.1]], dtype=torch.float64)
    stats = ExpertStats(torch.tensor(3.0), some, some, some, some, output_ED)
    assert reduction.choose(stats, ExpertsRecipe(num_experts=3, score="reap"), 0).groups == ((0,), (1,), (3,))
    merged = reduction.choose(stats, ExpertsRecipe(num_experts=2, assignment="merge"), 0)
    assert dict(zip(merged.groups, merged.shares, strict=True)) == {(0, 2): (0.5, 0.5), (1, 3): (2 / 3, 1 / 3)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = tiny.write_tasks(tmp_path_factory.mktemp("tasks"))
    return {name: made[name] for name in ("sums", "words")}


def reduce(source: Path, output: Path, tasks: dict[str, str], **keys: Any) -> dict[str, Any]:
    """Run without the proof in a process of its own, which takes seconds."""
    places = {f"experts.{name}": value for name, value in keys.items()}
    recipe = make_recipe(
        {
            "source": str(source),
            "method": "experts",
            "tasks": tasks,
            "device": "cpu",
            "calibration.tokens": 100,
            **places,
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "verify", lambda *_: {})
        patch.setattr(steps, "write_experts_card", lambda *_: None)
        return driver.convert(recipe, str(output))


@pytest.mark.parametrize("assignment", ["prune", "merge"])
@pytest.mark.parametrize("fused", [False, True], ids=["own", "fused"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_written_is_the_source_with_the_others_out_of_reach(
    tmp_path: Path, tasks: dict[str, str], model_type: str, fused: bool, assignment: str
) -> None:
    source = moes.save_moe(tmp_path / "source", model_type, fused=fused, dtype=torch.float64)
    found = reduce(source, tmp_path / "out", tasks, num_experts=LEFT, assignment=assignment)
    frequency = json.loads((tmp_path / "out" / "analysis" / "experts.json").read_text())["layers"]
    groups: dict[int, dict[int, dict[int, float]]] = {}
    for layer, numbers in zip(found["layers"], frequency, strict=True):
        count = numbers["scores"]["frequency"]
        groups[layer["layer"]] = {}
        for kept in layer["kept"]:
            members = kept if assignment == "merge" else [kept]
            total = sum(count[member] for member in members)
            shares = {member: count[member] / total if total else 1 / len(members) for member in members}
            groups[layer["layer"]][max(members, key=lambda member: count[member])] = shares
    assert sorted(groups) == moes.SPARSE[model_type]
    ids = tiny.token_ids(2, 7)
    with torch.no_grad():
        wanted = reference_experts.limit(moes.load_moe(source), groups, moes.TOP_K)(ids).logits
        made = moes.load_moe(tmp_path / "out")(ids).logits
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    # a softmax in float32 is within every one of these models
    assert (made - moes.load_moe(source)(ids).logits).abs().max() > 1e-2

    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    untouched = [name for name in before if ".experts." not in name and ".gate." not in name]
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    assert any(".experts.gate_up_proj" in name for name in after) == fused
    same = {key: value for key, value in before.config.items() if key not in COUNTS}
    assert {key: after.config[key] for key in same} == same
    key = next(key for key in COUNTS if key in before.config)
    assert after.config == {**before.config, key: LEFT}
    assert (tmp_path / "out" / MANIFEST).is_file() and (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("fused", "assignment"), [(False, "merge"), (True, "prune")], ids=["own", "fused"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_all_experts_kept_are_the_source_bit_for_bit(
    tmp_path: Path, tasks: dict[str, str], model_type: str, fused: bool, assignment: str
) -> None:
    source = moes.save_moe(tmp_path / "source", model_type, fused=fused, dtype=torch.bfloat16, max_shard_size="20KB")
    reduce(source, tmp_path / "out", tasks, num_experts=moes.EXPERTS, assignment=assignment)
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    assert len(list(source.glob("*.safetensors"))) > 1
    assert before.config == after.config
    assert set(before) == set(after)
    for name in before:
        assert before.dtype(name) == after.dtype(name) == torch.bfloat16
        assert torch.equal(before[name], after[name]), name


def test_the_proof_is_made_in_a_process_without_modmoe(tmp_path: Path, tasks: dict[str, str]) -> None:
    source = moes.save_moe(tmp_path / "source", "qwen2_moe", dtype=torch.bfloat16)
    found = modmoe.convert(
        source,
        tmp_path / "out",
        method="experts",
        num_experts=4,
        assignment="merge",
        tasks=tasks,
        tokens=200,
        device="cpu",
    )
    verified = found["verified"]
    assert verified["reloaded_without_modmoe"] and verified["greedy_tokens_equal"]
    assert verified["max_abs_logit_diff"] == 0.0 and set(verified["by_dtype"]) == {"bfloat16", "float32"}
    assert (found["method"], found["assignment"], found["score"]) == ("experts", "merge", "frequency")
    assert (found["num_experts"], found["num_experts_before"], found["top_k"]) == (4, moes.EXPERTS, moes.TOP_K)
    assert found["parameters"]["stored"] < found["parameters_before"]
    assert load_recipe(tmp_path / "out" / "modmoe.yaml").experts.num_experts == 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "became 4: means of their weights" in card
        and "reloaded with transformers alone" in card
        and str(tmp_path) not in card
    )
    json.dumps(found, allow_nan=False)


def test_a_checkpoint_that_is_not_what_was_chosen_is_not_left(
    tmp_path: Path, tasks: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = moes.save_moe(tmp_path / "source", "mixtral")
    right = steps.experts_plan

    def wrong(checkpoint: Any, blocks: Any, choices: Any, top_k: int) -> Any:
        moved = [reduction.keep([(expert + 1) % moes.EXPERTS for (expert,) in choice.groups]) for choice in choices]
        return right(checkpoint, blocks, moved, top_k)

    def reload_here(job: dict[str, Any]) -> dict[str, torch.Tensor]:
        model = moes.load_moe(Path(job["directory"]), torch.float32)
        ((logits, tokens),) = reload.compute(model, torch.tensor(job["input_ids"]), job["new_tokens"], [torch.float32])
        return {"float32.logits": logits, "float32.tokens": tokens}

    # a process of its own takes seconds
    monkeypatch.setattr(verify, "_reload", reload_here)
    asked = {"method": "experts", "num_experts": 4, "tasks": tasks, "tokens": 200, "device": "cpu"}
    assert modmoe.convert(source, tmp_path / "right", **asked)["verified"]["max_abs_logit_diff"] == 0
    monkeypatch.setattr(steps, "experts_plan", wrong)
    with pytest.raises(ExportError, match="differ from the model's"):
        modmoe.convert(source, tmp_path / "out", **asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["right", "source"]


def test_fewer_experts_than_a_token_had(
    tmp_path: Path, tasks: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    source = moes.save_moe(tmp_path / "source", "olmoe")
    with caplog.at_level(logging.WARNING, logger="modmoe"):
        found = reduce(source, tmp_path / "out", tasks, num_experts=1)
    assert "a token had 2 experts and has 1" in caplog.text and found["warnings"]
    assert read_config(tmp_path / "out")["num_experts_per_tok"] == found["top_k"] == 1
    assert torch.isfinite(moes.load_moe(tmp_path / "out")(tiny.token_ids()).logits).all()


def test_random_experts_are_the_seeds(tmp_path: Path) -> None:
    stats = measured("olmoe")[0][0]
    wanted = ExpertsRecipe(num_experts=LEFT, score="random")
    found = [reduction.choose(stats, wanted, seed) for seed in (1, 1, 2, 3, 4)]
    assert found[0] == found[1]
    assert len(set(found)) > 2


@pytest.mark.parametrize(("model_type", "fused"), list(zip(FAMILIES, itertools.cycle([False, True]), strict=False)))
def test_inspection_and_a_dry_run_count_what_is_there(
    tmp_path: Path, tasks: dict[str, str], model_type: str, fused: bool
) -> None:
    source = moes.save_moe(tmp_path / "source", model_type, fused=fused)
    plan = modmoe.convert(
        source, tmp_path / "out", method="experts", num_experts=LEFT, tasks=tasks, tokens=100, dry_run=True
    )
    assert not (tmp_path / "out").exists()
    reduce(source, tmp_path / "out", tasks, num_experts=LEFT)
    for directory, number in ((source, moes.EXPERTS), (tmp_path / "out", LEFT)):
        model = moes.load_moe(directory)
        biases = {name: bias for name, bias in model.named_buffers() if name.endswith("correction_bias")}
        own = {name: weight.numel() for name, weight in [*model.named_parameters(), *biases.items()]}
        routed = sum(size for name, size in own.items() if ".experts." in name)
        routers = [name for name in own if ".gate." in name or "shared_expert_gate" in name]
        ffn = sum(size for name, size in own.items() if ".mlp." in name and name not in routers)
        found = inspect(str(directory))
        skipped = routed * (number - moes.TOP_K) // number
        assert (found["num_experts"], found["top_k"]) == (number, moes.TOP_K)
        assert found["parameters"]["stored"] == found["parameters"]["materialised"] == sum(own.values())
        assert found["parameters"]["active"] == sum(own.values()) - skipped
        assert found["sparsity"]["ffn"] == pytest.approx(skipped / ffn, abs=1e-6)
    for kind in ("stored", "active", "materialised"):
        assert plan["parameters"][kind] == found["parameters"][kind]
    assert plan["num_experts"] == LEFT and plan["calibration_tokens"] == 200 and plan["calibration_flops"] > 0


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("GraniteMoeSharedConfig", {"num_local_experts": 4, "shared_intermediate_size": 24}),
        ("JambaConfig", {"num_experts": 4, "expert_layer_period": 2, "use_mamba_kernels": False}),
        ("DeepseekV3Config", {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    ],
)
def test_inspection_counts_experts_of_other_architectures(tmp_path: Path, name: str, values: dict[str, Any]) -> None:
    common = {**tiny._GATED, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**common, **values}))
    model.save_pretrained(tmp_path)
    own = {name: weight.numel() for name, weight in model.named_parameters()}
    routed = sum(size for name, size in own.items() if ".experts." in name)
    found = inspect(str(tmp_path))
    stored = found["parameters"]["stored"]
    assert (found["num_experts"], found["top_k"]) == (4, 2) and routed > 0
    assert 0 <= stored - sum(own.values()) <= 4 * len(model.model.layers)  # biases of the choice are no parameters
    assert found["parameters"]["active"] == stored - routed // 2
    assert routed / 2 / stored < found["sparsity"]["ffn"] <= 0.5


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("mixtral", {"num_experts": 7}, RecipeError, "7 is more than the 6 experts there are"),
    ("mixtral", {"num_experts": 0}, RecipeError, "num_experts: 0 is not above 0"),
    ("mixtral", {}, RecipeError, "experts.num_experts: is not given; say how many experts each layer keeps"),
    ("mixtral", {"num_experts": 3, "score": "reaper"}, RecipeError, "no score 'reaper'. Did you mean 'reap'"),
    ("mixtral", {"num_experts": 3, "assignment": "marge"}, RecipeError, "no such value 'marge'. Did you mean 'merge'"),
    (
        "mixtral",
        {"num_experts": 3, "assignment": "merge", "score": "reap"},
        RecipeError,
        "weighs experts by their freq",
    ),
    ("mixtral", {"num_experts": 3, "num_modules": 8}, RecipeError, "--num-modules: does not go with --method experts"),
    ("mixtral", {"num_experts": 3, "fit_bytes": 10}, RecipeError, "--fit-bytes: does not go with --method experts"),
    ("mixtral", {"num_experts": 3, "calibration.by_layer": True}, RecipeError, "with the whole model in memory"),
    ("glm4_moe", {"num_experts": 1}, RecipeError, "experts.num_experts: glm4_moe needs 2 at least"),
    ("llama", {"num_experts": 3}, CheckpointError, "has no experts ('llama' is dense)"),
    ("tied", {"num_experts": 2}, CheckpointError, "its experts share modules"),
    ("jamba", {"num_experts": 2}, CheckpointError, "the experts of 'jamba' cannot be reduced here"),
]


@pytest.mark.parametrize(("kind", "keys", "error", "words"), REFUSED, ids=[words[-24:] for *_, words in REFUSED])
def test_refusals_are_one_line(
    tmp_path: Path, tasks: dict[str, str], kind: str, keys: dict[str, Any], error: type[Exception], words: str
) -> None:
    source = tmp_path / "source"
    if kind == "llama":
        tiny.save_dense(source)
    elif kind == "tied":
        tied.save_tied(source, tiny.dense_model("llama"), tiny.save_dense(tmp_path / "dense"))
    else:
        moes.save_moe(source, kind if kind in moes.CONFIGS else "mixtral")
        config = read_config(source)
        (source / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(error) as caught:
        modmoe.convert(source, tmp_path / "out", method="experts", tasks=tasks, **keys)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path, tasks: dict[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    source = moes.save_moe(tmp_path / "source", "qwen3_moe")
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.experts.4.up_proj.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts.* differ in their number of experts"):
        reduce(source, tmp_path / "out", tasks, num_experts=2)


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe"])
def test_what_is_left_takes_an_adapter(tmp_path: Path, tasks: dict[str, str], model_type: str) -> None:
    source = moes.save_moe(tmp_path / "source", model_type)
    reduce(source, tmp_path / "out", tasks, num_experts=LEFT)
    found = modmoe.convert(
        tmp_path / "out", tmp_path / "adapter", method="adapters", adapter="perft_r", adapter_settings={"r": 2}
    )
    assert found["layers"] == len(moes.SPARSE[model_type])
    assert found["verified"]["max_abs_logit_diff"] == 0.0
    assert load(tmp_path / "adapter").get_base_model().config.num_local_experts == LEFT
