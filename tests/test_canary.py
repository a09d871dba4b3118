"""Checkpoints whose Python files and pickles would all leave a mark: no command lets them, and with the flag they do.

MODMOE_CANARY=all adds what takes long: the other methods of conversion and the proofs of all exports.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modmoe.cli.main import run
from modmoe.conversion.table import CONVERSIONS
from modmoe.errors import ExportError
from modmoe.formats.tied_code import CODE_FILES
from modmoe.recipe.schema import load_recipe
from tests.support import moes, tiny
from tests.support.export_models import OWN_CODE, write_own, write_tied

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

AUTO = {"AutoConfig": "canary.Config", "AutoModel": "canary.Model", "AutoModelForCausalLM": "canary.Model"}
TEMPLATE = "{{ cycler.__init__.__globals__.os.system('touch MARK/template') }}{{ messages[0]['content'] }}"
TOKENIZER = """
from transformers import PreTrainedTokenizerFast


class T(PreTrainedTokenizerFast):
    pass
"""
OWN_FAMILY = "family:\n  gate: mlp.gate_proj\n"


class Cage:
    """Hostile checkpoints, texts, and the folder in which whatever is executed leaves a mark."""

    def __init__(self, home: Path) -> None:
        self.home, self.marks = home, home / "marks"
        self.marks.mkdir(parents=True)
        self.tasks = tiny.write_tasks(home / "tasks", rows=12)
        rows = [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}] * 12
        (home / "tasks" / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def line(self, name: str) -> str:
        """Return the line of Python that leaves a mark."""
        return f"__import__('pathlib').Path({str(self.marks)!r}, {name!r}).touch()\n"

    def spoil(self, directory: Path, *, auto_map: bool = True) -> Path:
        """Put what is hostile beside a checkpoint's weights, and name it wherever a library could look for it."""
        for file in directory.glob("*.py"):
            file.write_text(self.line(file.stem) + file.read_text(encoding="utf-8"), encoding="utf-8")
        names = ("canary", "tokenization_canary", "modeling_llama", "setup", "sitecustomize", "conftest", "__init__")
        for name in (*names, "torch", "transformers", "safetensors", "yaml", "typer", "modmoe"):
            (directory / f"{name}.py").write_text(self.line(name) + TOKENIZER, encoding="utf-8")
        (directory / "custom_generate").mkdir()
        (directory / "custom_generate" / "generate.py").write_text(self.line("generate"), encoding="utf-8")
        for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
            value = json.loads((directory / name).read_text(encoding="utf-8"))
            value["trust_remote_code"] = True
            if name == "config.json" and auto_map:
                value["auto_map"] = {**AUTO, "AutoTokenizer": ["tokenization_canary.T", None]}
            if name == "tokenizer_config.json":
                value["auto_map"] = {"AutoTokenizer": ["tokenization_canary.T", "tokenization_canary.T"]}
                value["chat_template"] = TEMPLATE.replace("MARK", str(self.marks))
            (directory / name).write_text(json.dumps(value), encoding="utf-8")
        template = directory / "chat_template.jinja"
        template.write_text(TEMPLATE.replace("MARK", str(self.marks)), encoding="utf-8")
        for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "profile.pkl", "optimizer.pt"):
            self.write_pickle(directory / name)
        recipe = f"trust_remote_code: true\nsource: {directory}\n"
        (directory / "modmoe.yaml").write_text(recipe, encoding="utf-8")
        return directory

    def write_pickle(self, path: Path) -> None:
        """Write what leaves a mark when it is unpickled, alone or in torch's archive."""
        if path.suffix == ".pkl":
            path.write_bytes(pickle.dumps(Trap(str(self.marks / path.name))))
        else:
            torch.save({"state": {}, "param_groups": [], "trap": Trap(str(self.marks / path.name))}, path)

    def found(self) -> list[str]:
        """Return what was executed, and forget it."""
        marks = sorted(file.name for file in self.marks.iterdir())
        for file in self.marks.iterdir():
            file.unlink()
        return marks

    def task(self, *names: str) -> list[str]:
        """Return the flags of tasks."""
        return [word for name in names for word in ("--task", f"{name}={self.home}/tasks/{name}.jsonl")]


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def cage(tmp_path_factory: pytest.TempPathFactory) -> Cage:
    made = Cage(tmp_path_factory.mktemp("cage"))
    home = made.home
    tiny.save_dense(home / "dense", "mistral")
    made.spoil(home / "dense")
    moes.moe_model("mixtral").save_pretrained(home / "mixtral")
    tiny.tokenizer().save_pretrained(home / "mixtral")
    made.spoil(home / "mixtral")
    # code that works: a llama that is not transformers' own
    tiny.save_dense(home / "own", "llama")
    for name, text in OWN_CODE.items():
        (home / "own" / name).write_text(textwrap.dedent(text), encoding="utf-8")
    config = json.loads((home / "own" / "config.json").read_text(encoding="utf-8"))
    names = ("configuration_own.OwnConfig", "modeling_own.OwnModel", "modeling_own.OwnForCausalLM")
    config.update(model_type="own", architectures=["OwnForCausalLM"], auto_map=dict(zip(AUTO, names, strict=True)))
    (home / "own" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    made.spoil(home / "own", auto_map=False)
    for kind, write in (("tied", write_tied), ("tied_own", write_own)):
        (home / kind).mkdir()
        made.spoil(write(home / kind, *(["mistral"] if kind == "tied" else [])), auto_map=False)
    (home / "own.yaml").write_text(OWN_FAMILY, encoding="utf-8")
    command = ["convert", str(home / "dense"), str(home / "adapter"), "--method", "adapters", "--adapter", "comol"]
    assert run([*command, "-q"]) == 0
    for name in ("adapter_model.bin", "training_args.bin"):
        made.write_pickle(home / "adapter" / name)
    (home / "adapter" / "canary.py").write_text(made.line("canary"), encoding="utf-8")
    return made


@pytest.fixture(autouse=True)
def nothing_is_executed(cage: Cage) -> Iterator[None]:
    """What a test does not ask for is a failure of that test."""
    assert cage.found() == []
    yield
    assert cage.found() == []


TEXT = ("sums", "words")
SMALL = ("--tokens", "200", "--num-modules", "8")
TRAINING = ("--max-steps", "2", "--learning-rate", "1e-4", "--device", "cpu")
METHOD_FLAGS: dict[str, tuple[str, ...]] = {
    "prune": ("--active-fraction", "0.5", "--tokens", "200"),
    "upcycle": ("--num-experts", "2"),
    "experts": ("--num-experts", "4", "--tokens", "200"),
    "adapters": ("--adapter", "hydralora"),
}
NO_TEXT = ("adapters", "upcycle")

# words of the command, where {} is the cage's home and OUT the output; what it comes to
COMMANDS: dict[str, tuple[str, int]] = {
    "analyze": ("analyze {}/dense -o OUT TASKS --tokens 200 --num-modules 8 --report OUT.html", 0),
    **{
        f"convert {method}": (
            f"convert {{}}/{'mixtral' if method == 'experts' else 'dense'} OUT --method {method} "
            f"{'' if method in NO_TEXT else 'TASKS'} {' '.join(METHOD_FLAGS.get(method, SMALL))}",
            0,
        )
        for method in CONVERSIONS
    },
    "convert own": ("convert {}/own OUT TASKS --num-modules 8 -c {}/own.yaml", 2),
    "finetune router": ("finetune {}/tied OUT TASKS --train router TRAINING", 0),
    "finetune lora": ("finetune {}/tied OUT TASKS --train lora --distill-from {}/dense TRAINING", 0),
    "finetune adapters": ("finetune {}/adapter OUT TASKS --train adapters TRAINING", 0),
    "finetune own": ("finetune {}/tied_own OUT TASKS TRAINING", 2),
    "export tied": ("export {}/tied OUT --form tied --no-verify", 0),
    "export packed": ("export {}/tied OUT --form packed --no-verify", 0),
    "export native": ("export {}/tied OUT --form native --no-verify", 0),
    "export dense": ("export {}/tied OUT --form dense --expert words --no-verify", 0),
    "export own": ("export {}/tied_own OUT --form tied", 2),
    "export own, no proof": ("export {}/tied_own OUT --form tied --no-verify", 0),
    "export adapter": ("export {}/adapter OUT --form adapter --no-verify", 0),
    "export adapter tied": ("export {}/adapter OUT --form tied --no-verify", 0),
    "export adapter folded": ("export {}/adapter OUT --form dense --approximate TASKS --no-verify", 0),
    **{f"inspect {kind}": (f"inspect {{}}/{kind}", 0) for kind in ("dense", "tied/tied", "adapter")},
    "inspect own": ("inspect {}/own", 0),
    **{f"doctor {kind}": (f"doctor {{}}/{kind}", 2) for kind in ("tied", "tied_own")},
    **{f"doctor {kind}": (f"doctor {{}}/{kind}", 0) for kind in ("dense", "mixtral", "own", "adapter")},
    "eval": ("eval {}/tied TASKS --baseline {}/dense --tokens 200", 0),
    "eval own": ("eval {}/own TASKS --tokens 200", 2),
    "eval adapter": ("eval {}/adapter TASKS --tokens 200", 0),
    "push": ("push {}/tied me/tied --dry-run", 0),
}
LONG = (
    *(f"convert {method}" for method in ("cmoe", "moefication", "llama_moe", "upcycle", "experts")),
    *(f"export {form} proved" for form in ("tied", "packed", "native", "dense", "adapter", "adapter tied")),
)
COMMANDS |= {
    f"{name} proved": (line.removesuffix(" --no-verify"), 0)
    for name, (line, code) in COMMANDS.items()
    if line.endswith("--no-verify") and "own" not in name and "folded" not in name
}
if os.environ.get("MODMOE_CANARY") != "all":
    COMMANDS = {name: command for name, command in COMMANDS.items() if name not in LONG}


def words(cage: Cage, line: str, out: Path) -> list[str]:
    found = line.replace("{}", str(cage.home)).replace("OUT", str(out)).split()
    found = [f"{word}/tied" if word in (f"{cage.home}/tied", f"{cage.home}/tied_own") else word for word in found]
    spelled = {"TASKS": cage.task(*TEXT), "TRAINING": list(TRAINING)}
    return list(itertools.chain(*(spelled.get(word, [word]) for word in found)))


@pytest.mark.parametrize(("line", "code"), COMMANDS.values(), ids=COMMANDS)
def test_no_command_executes_what_lies_in_a_checkpoint(
    cage: Cage, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, code: int
) -> None:
    assert run([*words(cage, line, tmp_path / "out"), "-q"]) == code, capsys.readouterr().err
    error = capsys.readouterr().err
    assert code == 0 or "own" not in line or "doctor" in line or "--trust-remote-code" in error, error


def test_with_the_flag_the_same_code_is_executed(cage: Cage, tmp_path: Path) -> None:
    line = "convert {}/own OUT TASKS --num-modules 8 --tokens 200 -c {}/own.yaml --trust-remote-code"
    assert run([*words(cage, line, tmp_path / "out"), "-q"]) == 0
    assert {"configuration_own", "modeling_own", "layers_own", "tokenization_canary"} <= set(cage.found())


def test_a_recipe_cannot_give_trust(cage: Cage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may have come with the code; the flag beside it can, and what its keys say otherwise counts."""
    recipe = cage.home / "own" / "modmoe.yaml"
    for line in (f"validate {recipe}", f"convert {{}}/own OUT TASKS -c {recipe}"):
        assert run([*words(cage, line, tmp_path / "out"), "-q"]) == 2
        assert "trust_remote_code: a file cannot allow code" in capsys.readouterr().err
    assert load_recipe(recipe, {"trust_remote_code": True}).trust_remote_code
    assert load_recipe(recipe, {"trust_remote_code": False}).source == str(cage.home / "own")


def test_a_template_of_the_checkpoint_runs_in_a_sandbox(
    cage: Cage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (
        "analyze {}/dense -o OUT CHAT --tokens 200 --num-modules 8",
        "finetune {}/tied OUT CHAT --train router TRAINING",
        "eval {}/dense CHAT --tokens 200",
    ):
        command = words(cage, line.replace("CHAT", f"--task chat={cage.home}/tasks/chat.jsonl"), tmp_path / "out")
        assert run([*command, "-q"]) == 2
        assert "chat template refuses" in capsys.readouterr().err


def test_the_proof_of_an_export_executes_what_modmoe_wrote_alone(
    cage: Cage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fresh process trusts the export; what lies beside the source does not get there."""
    seen: dict[str, str] = {}

    def look(job: dict[str, Any]) -> None:
        assert job["options"]["trust_remote_code"]
        seen.update({file.name: file.read_text() for file in Path(job["directory"]).rglob("*.py")})
        raise ExportError("seen")

    monkeypatch.setattr(importlib.import_module("modmoe.formats.proof.verify"), "_reload", look)
    assert run([*words(cage, "export {}/tied OUT --form tied", tmp_path / "out"), "-q"]) == 2
    assert seen.keys() == set(CODE_FILES)
    assert not any(str(cage.marks) in text for text in seen.values())


@pytest.mark.parametrize("key", ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"])
def test_code_of_another_repository_does_not_get_into_an_export(
    cage: Cage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """It may lie in the cache, since a checkpoint's files are fetched with it: the proof would find it there."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--evil--repo" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    (snapshot / "modeling_modmoe.py").write_text(cage.line("cached"), encoding="utf-8")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    shutil.copytree(cage.home / "tied" / "tied", tmp_path / "tied")
    config = json.loads((tmp_path / "tied" / "config.json").read_text(encoding="utf-8"))
    config["auto_map"][key] = "evil/repo--modeling_modmoe.ModMoEMistralForCausalLM"
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for line in ("export TIED OUT --form tied", "finetune TIED OUT TASKS TRAINING"):
        command = words(cage, line.replace("TIED", str(tmp_path / "tied")), tmp_path / "out")
        assert run([*command, "-q"]) == 2
        assert f"auto_map: {key} names 'evil/repo--" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")


@pytest.fixture(scope="module")
def stopped(cage: Cage) -> Path:
    """A run that was stopped behind its first state."""
    import modmoe

    def stop(message: str, done: int | None = None, total: int | None = None) -> None:
        if message.startswith("training") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        modmoe.finetune(
            cage.home / "tied" / "tied",
            cage.home / "stopped",
            tasks={name: cage.tasks[name] for name in TEXT},
            max_steps=2,
            learning_rate=1e-4,
            save_steps=1,
            train="router",
            device="cpu",
            progress=stop,
        )
    return cage.home


@pytest.mark.parametrize("name", STATE)
def test_a_state_is_read_without_unpickling(
    cage: Cage, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for beside in stopped.glob("stopped*"):
        shutil.copytree(beside, tmp_path / beside.name)
    states = sorted(tmp_path.glob("stopped*/**/checkpoint-*"))
    assert states and all((state / name).is_file() for state in states), list(tmp_path.rglob("*"))
    for state in states:
        cage.write_pickle(state / name)
    line = "finetune {}/tied OUT TASKS --train router TRAINING --resume"
    code = run([*words(cage, line, tmp_path / "stopped"), "-q"])
    # what is not needed is not looked at
    error = capsys.readouterr().err
    assert code == (0 if name == "training_args.bin" else 2), error
    assert code == 0 or "is damaged, or not a state that was saved here" in error


def test_a_command_in_the_directory_of_a_checkpoint_imports_nothing_from_there(cage: Cage) -> None:
    program = Path(sys.executable).parent / "modmoe"
    if not program.is_file():
        pytest.skip("modmoe is not installed as a command")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = cage.home / "tied" / "tied"
    done = subprocess.run([program, "inspect", "."], cwd=where, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
