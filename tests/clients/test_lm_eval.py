from __future__ import annotations

import functools
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from modmoe import api
from modmoe.cli.main import run
from modmoe.errors import RecipeError
from modmoe.models.loading import load
from tests.support import planned, tiny

needs_lm_eval = [
    pytest.mark.clients,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: make test-clients"
    ),
]
TASKS = {
    "choose": """
        output_type: multiple_choice
        doc_to_text: "{{text}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{label}}"
        metric_list: [{metric: acc}]
    """,
    "bits": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: bits_per_byte}]
    """,
    "long": """
        output_type: generate_until
        doc_to_text: "{{text}}"
        doc_to_target: "{{text}}"
        generation_kwargs: {max_gen_toks: 1000}
        metric_list: [{metric: exact_match}]
    """,
    "broken": """
        output_type: multiple_choice
        dataset_kwargs: {data_files: {test: nowhere.jsonl}}
    """,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks: pieces of two texts, and four ends to choose from."""
    made = tmp_path_factory.mktemp("lm-eval")
    draw = random.Random(0)
    words = ["stone", "river", "light", "door", "wind", "paper", "salt", "bird"]
    rows = [
        {"text": " ".join(draw.choices(words, k=6)), "choices": draw.sample(words, 4), "label": draw.randrange(4)}
        for _ in range(30)
    ]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in TASKS.items():
        lines = [line.strip() for line in text.strip().splitlines()]
        lines += [f"task: {name}", "dataset_path: json", "test_split: test"]
        if name != "broken":
            lines.append(f"dataset_kwargs: {{data_files: {{test: {made / 'rows.jsonl'}}}}}")
        (made / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model as a dense one, tied with all modules on, native, packed, and with a new adapter."""
    home = tmp_path_factory.mktemp("forms")
    tiny.save_dense(home / "dense", mlp_bias=False)
    tasks = tiny.write_tasks(home / "tasks")
    api.convert(home / "dense", home / "tied", tasks=tasks, tokens=200, num_modules=8, modules_per_expert=8)
    for form in ("native", "packed"):
        api.export(home / "tied", home / form, form=form, verify=False)
    api.convert(home / "dense", home / "adapter", method="adapters", adapter="comol", num_experts=2)
    return {name: home / name for name in ("dense", "tied", "native", "packed", "adapter")}


def log_likelihood(model: Any, context: str, text: str) -> float:
    """Return the log-likelihood of a text after a context, or after the token that begins a text."""
    tokenizer = tiny.tokenizer()
    before = tokenizer(context)["input_ids"] or [tokenizer.bos_token_id]
    ids_T = torch.tensor(before + tokenizer(text)["input_ids"])
    with torch.no_grad():
        logs_TV = model(ids_T[None]).logits[0, :-1].log_softmax(-1)
    return float(logs_TV.gather(1, ids_T[1:, None])[len(before) - 1 :].sum())


def by_hand(model: Any, folder: Path) -> tuple[float, float]:
    """Return the accuracy of ``choose`` and the bits per byte of ``bits``, without lm-eval."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    right, logs, size = 0, 0.0, 0
    for row in rows:
        found = [log_likelihood(model, row["text"], f" {choice}") for choice in row["choices"]]
        right += found.index(max(found)) == row["label"]
        logs += log_likelihood(model, "", row["text"])
        size += len(row["text"].encode())
    return right / len(rows), -logs / size / torch.log(torch.tensor(2.0)).item()


def numbers(result: dict[str, Any]) -> tuple[float, float]:
    return result["choose"]["metrics"]["acc"]["value"], result["bits"]["metrics"]["bits_per_byte"]["value"]


def lines_of(err: str) -> list[str]:
    """Return the lines of stderr without tqdm's bars, which a command that runs alone turns off before tqdm is read."""
    return [line for line in err.splitlines() if line and "it/s]" not in line]


class TestWithLmEval:
    pytestmark = needs_lm_eval

    def test_every_form_gets_the_numbers_of_the_dense_model(self, forms: dict[str, Path], folder: Path) -> None:
        accuracy, bits = by_hand(load(forms["dense"]), folder)
        assert 0 < accuracy < 1
        for name in ("tied", "native", "packed", "adapter"):
            found = api.evaluate(
                forms[name], harness=["choose", "bits"], harness_path=folder, baseline=str(forms["dense"])
            )
            assert numbers(found["baseline"]) == pytest.approx((accuracy, bits), rel=1e-5)
            assert numbers(found["tasks"]) == pytest.approx((accuracy, bits), rel=1e-5), name
            for task in ("choose", "bits"):
                assert found["tasks"][task]["samples"] == 30
                for metric in found["tasks"][task]["metrics"].values():
                    assert abs(metric["difference"]) < 1e-5
            assert found["tasks"]["choose"]["metrics"]["acc"]["stderr"] == pytest.approx(
                (accuracy * (1 - accuracy) / 29) ** 0.5
            )
            assert found["tasks"]["choose"]["metrics"]["acc"]["higher_is_better"] is True
            assert found["tasks"]["bits"]["metrics"]["bits_per_byte"]["stderr"] is None

    def test_a_model_routed_by_task_uses_the_expert_that_is_named(
        self, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        dense, tied = planned.write_tied(tmp_path, routing="task")
        model = load(tied)
        command = ["eval", str(tied), "--harness", "choose,bits", "--harness-path", str(folder), "--json"]
        found = {}
        for expert in ("words", "code"):
            model.set_expert(expert)
            assert run([*command, "--expert", expert]) == 0
            found[expert] = numbers(json.loads(capsys.readouterr().out)["tasks"])
            assert found[expert] == pytest.approx(by_hand(model, folder), rel=1e-5)
        assert found["words"] != found["code"]
        both = api.evaluate(tied, harness=["bits"], harness_path=folder, expert="words", baseline=str(dense))
        metric = both["tasks"]["bits"]["metrics"]["bits_per_byte"]
        bits = by_hand(load(dense), folder)[1]
        assert metric["value"] == pytest.approx(found["words"][1], rel=1e-5)
        assert metric["difference"] == pytest.approx(found["words"][1] - bits, rel=1e-4)
        fixed, adapter = tmp_path / "fixed", tmp_path / "adapter"
        api.export(tied, fixed, form="tied", expert="words", verify=False)
        api.convert(fixed, adapter, method="adapters", adapter="comol", num_experts=2)
        for expert in (None, "code"):
            over = api.evaluate(adapter, harness=["choose", "bits"], harness_path=folder, expert=expert)
            assert numbers(over["tasks"]) == pytest.approx(found[expert or "words"], rel=1e-5)
        assert run(command) == 2
        assert "tasks.choose: is no expert of this model, which is routed by task" in capsys.readouterr().err
        assert run([*command, "--expert", "cod"]) == 2
        assert "--expert: no expert 'cod'. Did you mean 'code'?" in capsys.readouterr().err

    def test_the_table_has_a_row_for_each_metric(
        self, forms: dict[str, Path], folder: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        command = ["eval", str(forms["tied"]), "--harness", "bits,choose", "--harness-path", str(folder)]
        assert run([*command, "--limit", "7", "--baseline", str(forms["dense"])]) == 0
        out, err = capfd.readouterr()
        lines = [line.split() for line in out.splitlines()]
        assert ["task", "metric", "value", "stderr", "baseline", "difference", "samples"] in lines
        assert [line[:2] + line[-1:] for line in lines if line[0] in ("bits", "choose")] == [
            ["bits", "bits_per_byte", "7"],
            ["choose", "acc", "7"],
        ]
        assert all(line.startswith("modmoe: ") for line in lines_of(err)), err
        assert "running choose: 28 requests" in err

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            ("chose", "--harness: lm-eval has no task 'chose'. Did you mean 'choose'?"),
            ("broken", "--harness: broken: lm-eval cannot build it: "),
            ("long", "--harness: long: lm-eval stopped: Invalid configuration: requested max tokens"),
        ],
    )
    def test_a_task_that_cannot_be_run_is_told_in_one_line(
        self,
        names: str,
        words: str,
        forms: dict[str, Path],
        folder: Path,
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        import lm_eval.tasks

        # lm-eval's own tasks are thousands of files, which take ten seconds to read
        manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **_: manager(include_path=include_path))
        assert run(["eval", str(forms["dense"]), "--harness", names, "--harness-path", str(folder), "-q"]) == 2
        out, err = capfd.readouterr()
        assert (out, len(lines_of(err))) == ("", 1), err
        assert lines_of(err)[0].startswith(f"modmoe: {words}")


def test_without_lm_eval_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(["eval", "nowhere", "--harness", "arc_easy"]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err == "modmoe: --harness: lm-eval is not installed; pip install 'modmoe[eval]'.\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--harness a --task b=c", "--harness: goes without --task"),
        ("--harness a,,b", "--harness: 'a,,b' is not a list of different names"),
        ("--harness a,a", "--harness: 'a,a' is not a list of different names"),
        ("--harness a --tokens 9", "--tokens: goes with --task, not with --harness"),
        ("--harness a --limit 0", "--limit: 0 is not above 0."),
        ("--task a=b --limit 3", "--limit: goes with --harness"),
        ("--task a=b --harness-path d", "--harness-path: goes with --harness"),
    ],
)
def test_flags_that_do_not_go_together(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "nowhere", *flags.split()]) == 2
    assert f"modmoe: {words}" in capsys.readouterr().err


def test_tasks_or_harness_are_needed() -> None:
    with pytest.raises(RecipeError, match="give tasks with their text, or harness"):
        api.evaluate("nowhere")
    with pytest.raises(RecipeError, match="harness_path and limit go with harness"):
        api.evaluate("nowhere", {"a": "b"}, limit=3)
