"""One result on stdout, everything else on stderr; flags reach the steps as they were meant."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from modmoe import api
from modmoe.cli.console import Console, size_words
from modmoe.cli.main import run


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Replace the steps by ones that print, warn, log and report progress, and remember what they were called with."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def step(*args: Any, **keywords: Any) -> dict[str, Any]:
        calls.append((args, keywords))
        print("a library prints to stdout")
        logging.getLogger("modmoe.test").info("a log line")
        if "progress" in keywords:
            for done in range(3):
                keywords["progress"]("working", done, 2)
        return {"loss": float("nan"), "parameters": {"dense": 1000}, "tasks": {"a": {"loss": 1.5, "tokens": 7}}}

    for name in ("analyze", "convert", "finetune", "export", "inspect", "evaluate"):
        monkeypatch.setattr(api, name, step)
    return calls


COMMANDS = [
    "analyze d -o out --task a=1",
    "convert d out --task a=1",
    "finetune d out --task a=1",
    "export d out --form tied",
    "inspect d",
    "eval d --task a=1",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_alone_on_stdout(command: str, noisy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "loss": None,
        "parameters": {"dense": 1000},
        "tasks": {"a": {"loss": 1.5, "tokens": 7}},
    }
    assert out.count("\n") == 1
    assert "a library prints to stdout" in err
    assert sys.stdout is not sys.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_people_read_tables_and_what_comes_next(command: str, noisy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command.split()) == 0
    out, err = capsys.readouterr()
    assert "parameters.dense  1,000" in out
    assert "name  loss  tokens\n  a     1.5   7\n" in out
    assert "a library prints" not in out
    assert "modmoe: a log line" in err
    if command.split()[0] in ("analyze", "convert", "finetune", "export"):
        assert "next: modmoe " in err
    if command.split()[0] in ("analyze", "convert", "finetune"):
        assert "modmoe: working: 2" in err


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("convert d out --task a=1 -c r.yaml", "modmoe finetune out OUT -c r.yaml --task a=1"),
        ("convert d out", "modmoe finetune out OUT ..."),
        ("convert d out --task a=1 --dry-run", "the same without --dry-run"),
        ("finetune d dense --task a=1", "modmoe eval dense --task a=1 --baseline d"),
        ("finetune d tied --task a=1", "modmoe export tied OUT --format safetensors --form tied"),
    ],
)
def test_what_comes_next_is_a_command_that_runs(
    command: str,
    wanted: str,
    noisy: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, kind in {"dense": "llama", "tied": "modmoe_llama"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(command.split()) == 0
    assert f"next: {wanted}\n" in capsys.readouterr().err


def test_one_expert_is_pointed_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for count in (1, 2):
        result = {"stored_modules": [2], "num_experts": count}
        monkeypatch.setattr(api, "convert", lambda *_, result=result, **__: result)
        assert run(["convert", "d", "out", "--task", "a=1", "--trust-remote-code"]) == 0
        err = capsys.readouterr().err
        assert ("note: there is one expert" in err) == (count == 1)
        assert "next: modmoe finetune out OUT --task a=1 --distill-from d --trust-remote-code\n" in err


def test_quiet_says_nothing(noisy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "d", "out", "--task", "a=1", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_flags_reach_the_step(noisy: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "convert d out -c r.yaml --task a=1.txt --task b=x=y.txt --method modular --tokens 10 --num-modules 4 "
        "--num-experts 2 --modules-per-expert 2 --shared-modules 1 --top-k 1 --routing task --partition random "
        "--assignment top_score --score wanda --dry-run --overwrite --seed 7 --device cpu --trust-remote-code "
        "--allow-code --revision main --json"
    )
    assert run(line.split()) == 0
    (args, keywords) = noisy[0]
    assert args == ("d", "out", "r.yaml")
    given = {name: value for name, value in keywords.items() if value is not None and name != "progress"}
    assert given == {
        "tasks": {"a": "1.txt", "b": "x=y.txt"},
        "method": "modular",
        "tokens": 10,
        "num_modules": 4,
        "num_experts": 2,
        "modules_per_expert": 2,
        "shared_modules": 1,
        "top_k": 1,
        "routing": "task",
        "partition": "random",
        "assignment": "top_score",
        "score": "wanda",
        "dry_run": True,
        "overwrite": True,
        "seed": 7,
        "device": "cpu",
        "trust_remote_code": True,
        "allow_code": True,
        "revision": "main",
    }


def test_flags_left_out_leave_the_recipe(noisy: list[Any]) -> None:
    assert run(["convert", "d", "out", "--json"]) == 0
    _, keywords = noisy[0]
    given = {name for name, value in keywords.items() if value is not None}
    assert given == {"allow_code", "overwrite", "dry_run", "progress"}


@pytest.mark.parametrize("command", ["analyze d -o o", "convert d o", "finetune d o"])
def test_every_flag_is_a_keyword_of_its_step(command: str, noisy: list[Any]) -> None:
    assert run([*command.split(), "--task", "a=1", "--json"]) == 0
    own = {"report", "overwrite", "dry_run", "revision", "progress", "fit_bytes", "eval_tasks", "resume"}
    own |= {"estimate_for", "allow_code"}
    assert set(noisy[0][1]) - own <= set(api.KEYWORDS[command.split()[0]])


def test_finetune_export_and_eval_flags(noisy: list[Any]) -> None:
    finetune = "finetune d o --task a=1 --eval b=2 --train lora --distill-from e --max-steps 3 --learning-rate 1e-4"
    assert run([*finetune.split(), "--resume", "--json"]) == 0
    export = "export d o --format safetensors --form dense --expert a --dtype float16 --json"
    assert run(export.split()) == 0
    assert run(["eval", "d", "--task", "a=1", "--baseline", "e", "--json"]) == 0
    (_, tuned), (_, exported), (measured_args, measured) = noisy
    assert (tuned["eval_tasks"], tuned["train"], tuned["learning_rate"]) == ({"b": "2"}, "lora", 1e-4)
    assert (tuned["resume"], tuned["distill_from"], tuned["max_steps"]) == (True, "e", 3)
    assert (exported["form"], exported["expert"], exported["dtype"]) == ("dense", "a", "float16")
    assert (exported["target"], exported["max_shard_size"]) == ("auto", "5GB")
    assert measured_args == ("d", {"a": "1"})
    assert measured["baseline"] == "e"


def test_recipes_and_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "ls", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["recipes"]]
    assert {"three-tasks", "spllama-own-code"} <= set(names)
    for name in names:
        file = tmp_path / f"{name}.yaml"
        assert run(["recipes", "cp", name, str(file)]) == 0
        assert run(["recipes", "cp", name, str(file)]) == 2
        assert run(["recipes", "cp", name, str(file), "--overwrite"]) == 0
        capsys.readouterr()
        assert run(["recipes", "show", name]) == 0
        assert capsys.readouterr().out == file.read_text()
        assert run(["validate", str(file), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["ok"] is True
        method = "adapters" if shown["recipe"]["adapter"]["method"] else "experts" if "experts" in name else "modular"
        peers = {name: name for name in ("cmoe", "emoe", "moefication")} | {"llama-moe": "llama_moe", "flap": "prune"}
        method = "upcycle" if "upcycle-" in name else method
        assert shown["recipe"]["method"] == peers.get(name, method)


def test_a_validated_recipe_is_itself_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    assert run(["recipes", "cp", "three-tasks", str(file), "-q"]) == 0
    assert run(["validate", str(file)]) == 0
    resolved = capsys.readouterr().out
    file.write_text(resolved)
    assert run(["validate", str(file)]) == 0
    assert capsys.readouterr().out == resolved


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partition: {method: kmean}", "partition.method"),
        ("assignment: {score: wnda}", "Did you mean 'wanda'"),
        ("method: emoes", "method: no method 'emoes'"),
        ("family: {gat: x}", "family.gat: no such field. Did you mean 'gate'"),
        ("partitions: {method: kmeans}", "Did you mean 'partition'"),
        ("tasks: {a: x}\nrouter: {top_k: 5}", "router.top_k: 5 is more than the 1 experts"),
    ],
)
def test_a_wrong_recipe_names_its_file_and_place(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    assert run(["validate", str(file), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"modmoe: {file}: ")
    assert words in err


def test_env_never_shows_a_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "hf_" + "s" * 30
    monkeypatch.setenv("HF_TOKEN", secret)
    assert run(["env", "--json"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["hf_token"] == "set"
    assert secret not in out + err
    assert shown["packages"]["torch"]
    assert shown["threads"] >= 1
    monkeypatch.delenv("HF_TOKEN")
    assert run(["env", "--verbose"]) == 0
    assert "hf_token" in capsys.readouterr().out


def test_warnings_of_modmoe_are_shown_and_those_of_libraries_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    with Console():
        warnings.warn_explicit("ours,\n of two lines", UserWarning, "x.py", 1, module="modmoe.conversion")
        warnings.warn_explicit("theirs", UserWarning, "y.py", 1, module="transformers.trainer")
    assert capsys.readouterr() == ("", "modmoe: warning: ours, of two lines\n")


@pytest.mark.parametrize(
    ("size_bytes", "words"), [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (4e9, "4.00 GB"), (2e15, "2000.00 TB")]
)
def test_sizes_as_people_read_them(size_bytes: float, words: str) -> None:
    assert size_words(size_bytes) == words
