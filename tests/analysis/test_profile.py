"""The streaming pass against direct sums, over every family."""

# Shapes: P tasks, B sequences of a batch, T tokens, D model width, F neurons, M modules, S rows of the sketch

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modmoe.analysis import profile as profile_file
from modmoe.analysis.partitions.table import Partition
from modmoe.analysis.passes.stream import Turn, WholeModel, down_weight, watched
from modmoe.analysis.profile import ActivationProfile, load_profiles, profile_model, save_profiles
from modmoe.analysis.text.calibration import Batch
from modmoe.errors import CalibrationError, CheckpointError, PartitionError
from modmoe.models.families import FAMILIES
from tests.support.tiny import NEURONS, dense_model

FIELDS = ("tokens_P", "sum_PF", "abs_PF", "square_PF", "taylor_PF", "norm_PM")
FEW = ("llama", "gpt2", "opt", "phi3")


def texts(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def padded(sequences: list[list[int]], width: int | None = None) -> Batch:
    width = width or max(map(len, sequences))
    ids_BT = torch.full((len(sequences), width), 7)
    mask_BT = torch.zeros_like(ids_BT)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence)
        mask_BT[row, : len(sequence)] = 1
    return Batch(ids_BT, mask_BT)


TASKS = {"a": texts(1, (9, 5, 7)), "b": texts(2, (6, 8))}


def partition() -> Partition:
    return Partition(torch.randperm(NEURONS, generator=torch.Generator().manual_seed(3)) % 8, 8)


def direct(model: Any, model_type: str, layer: int, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return h and dL/dh of each token, one sequence at a time and with no padding anywhere."""
    family = FAMILIES[model_type]
    hidden, slopes = [], []
    for sequence in sequences:
        kept: list[Tensor] = []

        def keep(at: int, h: Tensor, _: Turn, kept: list[Tensor] = kept) -> Tensor | None:
            if at != layer:
                return None
            kept.append(h.detach().clone().requires_grad_())
            return kept[0]

        ids_T = torch.tensor([sequence])
        with watched(model, family, Turn(0, 0, padded([sequence])), on_hidden=keep):
            logits_TV = model(input_ids=ids_T).logits[0]
        loss = torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[0, 1:], reduction="sum")
        (slope,) = torch.autograd.grad(loss, kept[0])
        hidden.append(kept[0].detach().reshape(-1, NEURONS))
        slopes.append(slope.reshape(-1, NEURONS))
    return torch.cat(hidden), torch.cat(slopes)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_streaming_equals_direct_sums(model_type: str) -> None:
    model = dense_model(model_type).double()
    modules = partition()
    batches = {"a": [padded(TASKS["a"][:2]), padded(TASKS["a"][2:])], "b": [padded(TASKS["b"])]}
    seen: list[int] = []
    profiles = profile_model(
        WholeModel(model, FAMILIES[model_type]), batches, partitions=[modules] * 2, gradients=True, progress=seen.append
    )
    assert seen == [14, 7, 14]
    for layer, profile in enumerate(profiles):
        assert profile.task_names == ("a", "b")
        assert profile.tokens_P.tolist() == [21, 14]
        down_DF = down_weight(model, FAMILIES[model_type], layer)
        for task, sequences in enumerate(TASKS.values()):
            h_TF, slope_TF = direct(model, model_type, layer, sequences)
            size_TF = h_TF.abs()
            wanted = {
                "sum_PF": h_TF.sum(0),
                "abs_PF": size_TF.sum(0),
                "square_PF": h_TF.square().sum(0),
                "taylor_PF": (h_TF * slope_TF).abs().sum(0),
                "norm_PM": torch.stack(
                    [
                        (h_TF[:, modules.module_F == m] @ down_DF[:, modules.module_F == m].T).norm(dim=1).sum()
                        for m in range(8)
                    ]
                ),
            }
            for field, value in wanted.items():
                found = getattr(profile, field)[task]
                assert found.dtype == torch.float64
                torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-11, msg=lambda m, f=field: f"{f}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_of_low_precision_add_up_in_high(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    # four rows a piece: 27 tokens make six whole ones and a part
    monkeypatch.setattr(profile_file, "_CHUNK_NUMBERS", 4 * NEURONS)
    runner = WholeModel(dense_model("llama").to(dtype), FAMILIES["llama"])
    batches, rows = {"a": [padded(texts(8, (9, 11, 7)))]}, []
    runner.run(batches, on_hidden=lambda layer, h, turn: rows.append(turn.real_rows(h).double()))
    for profile, h_TF in zip(profile_model(runner, batches), rows, strict=True):
        assert len(h_TF) == 27
        atol = 1e-6 * float(h_TF.abs().max())
        for found, wanted_F in (
            (profile.sum_PF, h_TF.sum(0)),
            (profile.abs_PF, h_TF.abs().sum(0)),
            (profile.square_PF, h_TF.square().sum(0)),
        ):
            torch.testing.assert_close(found[0], wanted_F, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("model_type", FEW)
def test_padding_does_not_move_a_statistic(model_type: str) -> None:
    runner = WholeModel(dense_model(model_type).double(), FAMILIES[model_type])
    tight = {name: [padded([one]) for one in sequences] for name, sequences in TASKS.items()}
    loose = {name: [padded(sequences, 19)] for name, sequences in TASKS.items()}
    options: dict[str, Any] = {"partitions": [partition()] * 2, "gradients": True, "sketch_rows": 11, "seed": 4}
    for one, two in zip(profile_model(runner, tight, **options), profile_model(runner, loose, **options), strict=True):
        for field in FIELDS:
            torch.testing.assert_close(getattr(one, field), getattr(two, field), rtol=1e-9, atol=1e-11)
        assert one.rows_SF.shape == (11, NEURONS)
        torch.testing.assert_close(one.rows_SF, two.rows_SF)


def test_merge_equals_the_profile_of_both() -> None:
    runner = WholeModel(dense_model("llama").double(), FAMILIES["llama"])
    options: dict[str, Any] = {"partitions": [partition()] * 2, "gradients": True}
    first = profile_model(runner, {"a": [padded(TASKS["a"][:2])]}, **options)
    second = profile_model(runner, {"b": [padded(TASKS["b"])], "a": [padded(TASKS["a"][2:])]}, **options)
    both = profile_model(
        runner, {"a": [padded(TASKS["a"][:2]), padded(TASKS["a"][2:])], "b": [padded(TASKS["b"])]}, **options
    )
    for one, two, whole in zip(first, second, both, strict=True):
        merged = one.merge(two)
        assert merged.task_names == whole.task_names
        for field in FIELDS:
            torch.testing.assert_close(getattr(merged, field), getattr(whole, field), rtol=1e-12, atol=1e-12)
        # both sketches held all they saw, so the merged one does
        assert merged.rows_seen == whole.rows_seen == len(merged.rows_SF) == 35
        assert {tuple(row) for row in merged.rows_SF.tolist()} == {tuple(row) for row in whole.rows_SF.tolist()}


def synthetic(rows_SF: Tensor, rows_seen: int, taylor: bool = False) -> ActivationProfile:
    zeros_PF = torch.zeros(1, rows_SF.shape[1], dtype=torch.float64)
    taylor_PF = zeros_PF if taylor else None
    return ActivationProfile(
        ("t",), torch.tensor([rows_seen]), zeros_PF, zeros_PF, zeros_PF, taylor_PF, rows_SF, rows_seen
    )


def test_merged_sketches_hold_rows_in_proportion_to_what_was_seen() -> None:
    one, two = synthetic(torch.zeros(200, 2), 3000), synthetic(torch.ones(200, 2), 1000)
    merged = one.merge(two)
    assert merged.rows_SF.shape == (200, 2)
    assert 0.15 < float(merged.rows_SF.mean()) < 0.35
    assert torch.equal(merged.rows_SF, one.merge(two).rows_SF)


def test_profiles_that_do_not_belong_together_are_refused() -> None:
    one = synthetic(torch.zeros(4, 2), 4)
    with pytest.raises(CalibrationError, match="of different layers"):
        one.merge(synthetic(torch.zeros(4, 3), 4))
    with pytest.raises(CalibrationError, match="taylor_PF differs"):
        one.merge(synthetic(torch.zeros(4, 2), 4, taylor=True))


def test_the_sketch_is_a_uniform_draw_of_the_tokens() -> None:
    runner = WholeModel(dense_model("llama"), FAMILIES["llama"])
    batches = {"a": [padded(texts(5, (30, 30)))], "b": [padded(texts(6, (30, 30)))]}
    whole = profile_model(runner, batches, sketch_rows=500)[0].rows_SF
    assert len(whole) == 120
    counts = torch.zeros(120)
    for seed in range(60):
        rows_SF = profile_model(runner, batches, sketch_rows=40, seed=seed)[0].rows_SF
        assert len(rows_SF) == 40
        counts += (torch.cdist(whole.double(), rows_SF.double()).min(1).values < 1e-6).float()
    # each token is in a third of the draws: 20 +- 3.7 of 60, so none lies six deviations off
    assert int(counts.min()) > 0
    assert int(counts.max()) < 43


def test_the_model_is_left_as_it_was() -> None:
    runner = WholeModel(dense_model("llama"), FAMILIES["llama"])
    model: Any = runner.model.train()
    model.model.layers[0].eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    before = [submodule.training for submodule in model.modules()]
    profile_model(runner, {"a": [padded(TASKS["a"])]}, gradients=True)
    assert [submodule.training for submodule in model.modules()] == before
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)
    assert all(parameter.grad is None for parameter in parameters)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile_model(runner, {"a": [padded(TASKS["a"])]}, progress=stop)
    assert not any(submodule._forward_pre_hooks for submodule in model.modules())


def test_round_trip_through_the_disk_is_exact(tmp_path: Path) -> None:
    runner = WholeModel(dense_model("opt"), FAMILIES["opt"])
    batches = {"a": [padded(TASKS["a"])], "b": [padded(TASKS["b"])]}
    for number, options in enumerate(({}, {"gradients": True, "partitions": [partition()] * 2})):
        profiles = profile_model(runner, batches, **options)
        directory = tmp_path / str(number)
        path = save_profiles(directory, profiles)
        assert path == directory / "profile.safetensors"
        assert [file.name for file in directory.iterdir()] == ["profile.safetensors"]
        for one, two in zip(profiles, load_profiles(path), strict=True):
            assert one.task_names == two.task_names
            assert one.rows_seen == two.rows_seen
            for field in (*FIELDS, "rows_SF"):
                mine, theirs = getattr(one, field), getattr(two, field)
                assert (mine is None and theirs is None) or torch.equal(mine, theirs), field


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_profiles(tmp_path)
    (tmp_path / "profile.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match="damaged"):
        load_profiles(tmp_path)


def test_what_cannot_be_profiled_is_said_in_one_line() -> None:
    runner = WholeModel(dense_model("llama"), FAMILIES["llama"])
    batch = padded(TASKS["a"])
    with pytest.raises(CalibrationError, match=r"tasks\.b: no tokens"):
        profile_model(runner, {"a": [batch], "b": []})
    with pytest.raises(PartitionError, match="1 partitions for 2 layers"):
        profile_model(runner, {"a": [batch]}, partitions=[partition()])
    with pytest.raises(PartitionError, match="a partition of 4 neurons for 48"):
        profile_model(runner, {"a": [batch]}, partitions=[Partition(torch.arange(4), 4)] * 2)
    runner.model.get_parameter("model.layers.1.mlp.up_proj.weight").data.fill_(float("inf"))
    with pytest.raises(CalibrationError, match=r"layer 1: .* is not finite"):
        profile_model(runner, {"a": [batch]})
