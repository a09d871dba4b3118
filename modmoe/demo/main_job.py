"""The whole main job on the model that ships with modmoe: offline, in some minutes on two cores.

Text of three tasks is found on the machine itself (see ``modmoe.demo.corpus``); the dense model becomes three experts
that share their modules, is fine-tuned to follow the dense one, measured on text that neither has seen, and exported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modmoe import api
from modmoe.demo.corpus import DOMAINS, write_task_files
from modmoe.errors import RecipeError
from modmoe.storage.files import check_file, check_name, is_page, kind_of
from modmoe.storage.staging import check_output, open_output

Progress = Callable[..., None]

MODEL = Path(__file__).parent / "model"
"""The dense checkpoint that ships with the package."""
PROMPTS = {
    "code": "    def __repr__(self):\n        return",
    "docs": "Return True if",
    "arithmetic": "Question: Which is larger, 41 or 18?\nAnswer:",
}
"""What each model continues."""
DENSE_EXPERT = "arithmetic"
"""The expert that the dense export keeps."""
EXPORTS: dict[str, dict[str, Any]] = {
    "tied": {"form": "tied"},
    "dense": {"form": "dense", "expert": DENSE_EXPERT},
    "native": {"form": "native", "target": "mixtral"},
}
"""What is exported, and how."""
REPORT = "report.html"
_DEFAULT_OUTPUT = "modmoe-demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much the demo does."""

    train_rows: int = 2000
    """Rows of each task to calibrate and train with."""
    held_out_rows: int = 200
    """Rows of each task to measure with."""
    calibration_tokens: int = 16384
    """Of each task."""
    eval_tokens: int = 8192
    """Of each task and model."""
    max_steps: int = 150
    """Of fine-tuning."""
    batch_size: int = 8
    """Sequences of a step."""
    sequence_length: int = 128
    """Tokens of a training sequence."""
    learning_rate: float = 6e-4
    """Its peak."""
    distill_weight: float = 0.7
    """Share of the distillation loss."""
    new_tokens: int = 40
    """Of each sample."""


@dataclass(slots=True)
class _Run:
    """What the stages hand on."""

    output: Path
    seed: int
    overwrite: bool
    effort: Effort
    progress: Progress
    result: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def place(self, name: str) -> str:
        return str(self.output / name)

    def files(self, split: str) -> dict[str, str]:
        return {domain: str(self.output / "tasks" / split / f"{domain}.jsonl") for domain in DOMAINS}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.progress(name)
        started_s = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started_s, 2)


def run(
    output: str | None = None,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    effort: Effort | None = None,
) -> dict[str, Any]:
    """Convert, fine-tune, measure, export and report on the shipped model.

    Args:
        output: a directory that is free; None means ``modmoe-demo`` here. It gets ``tasks``, ``converted``, ``tuned``,
            three exports and ``report.html``.
        seed: of everything that draws numbers.
        overwrite: replace what an earlier run left in ``output``; other files there stay.
        progress: called with a message and, where they are known, the steps done and the steps in all.
        effort: how much is done; None is what fits in three minutes on two cores.

    Returns ``models`` (dense, converted, fine-tuned: ``loss`` by task, ``stored``, ``active``,
    ``decode_tokens_per_second``, ``directory``), ``samples`` (task to model to text), ``exports`` (form to what that
    export returned), ``conversion``, ``training``, ``tasks``, ``report``, ``output`` and ``seconds`` by stage and in
    total.

    Raises:
        ModmoeError: ``output`` is not free, or cannot be written.
    """
    started_s = time.monotonic()
    with _surroundings():
        directory = Path(output or _DEFAULT_OUTPUT)
        _check_places(directory, overwrite=overwrite)
        job = _Run(directory, seed, overwrite, effort or Effort(), progress or _silent)
        _write_tasks(job)
        _convert(job)
        _finetune(job)
        _measure(job)
        _export(job)
        _report(job)
    return {
        **job.result,
        "output": str(job.output),
        "seconds": {**job.seconds, "total": round(time.monotonic() - started_s, 2)},
    }


def _check_places(directory: Path, *, overwrite: bool) -> None:
    """Refuse a directory in which something is not as an earlier run left it, before anything is made."""
    check_name(directory)
    if directory.exists() and not directory.is_dir():
        raise RecipeError(str(directory), f"is {kind_of(directory)}", "name a directory")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise RecipeError(str(directory), "is not empty", "name another directory or pass --overwrite")
    for name in ("tasks", "converted", "tuned", *(f"export-{form}" for form in EXPORTS)):
        check_output(directory / name, overwrite=overwrite)
    check_file(directory / REPORT, overwrite=overwrite, is_ours=is_page)


@contextmanager
def _surroundings() -> Iterator[None]:
    """Set variables that libraries read when they are first imported; they are put back at the end."""
    wanted = {
        # nothing here asks the Hub; a library that wants to must not wait for a network that is not there
        "HF_HUB_OFFLINE": "1",
        # threads that spin while they wait make a model as small as this ten times slower on a busy machine
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _silent(*_: Any) -> None:
    """Report no progress."""


def _write_tasks(job: _Run) -> None:
    with job.stage("writing the tasks"):
        sizes = {"train": job.effort.train_rows, "held_out": job.effort.held_out_rows}
        with open_output(job.place("tasks"), overwrite=job.overwrite) as partial:
            for split, rows in sizes.items():
                write_task_files(partial / split, split=split, rows_per_task=rows, seed=job.seed)
    train, held_out = job.files("train"), job.files("held_out")
    job.result["tasks"] = {name: {"train": train[name], "held_out": held_out[name]} for name in DOMAINS}


def _convert(job: _Run) -> None:
    with job.stage("converting"):
        job.result["conversion"] = api.convert(
            MODEL,
            job.place("converted"),
            tasks=job.files("train"),
            tokens=job.effort.calibration_tokens,
            num_modules=16,
            active_fraction=0.5,
            routing="token",
            seed=job.seed,
            device="cpu",
            overwrite=job.overwrite,
            progress=job.progress,
        )


def _finetune(job: _Run) -> None:
    effort = job.effort
    with job.stage("fine-tuning"):
        job.result["training"] = api.finetune(
            job.place("converted"),
            job.place("tuned"),
            tasks=job.files("train"),
            train="full",
            distill_from=str(MODEL),
            distill_weight=effort.distill_weight,
            max_steps=effort.max_steps,
            learning_rate=effort.learning_rate,
            batch_size=effort.batch_size,
            sequence_length=effort.sequence_length,
            # a state to go on from is not needed for a minute's work
            save_steps=effort.max_steps + 1,
            seed=job.seed,
            device="cpu",
            overwrite=job.overwrite,
            progress=job.progress,
        )


def _measure(job: _Run) -> None:
    from modmoe.models.loading import load, load_tokenizer
    from modmoe.training.evaluation.task_loss import decode_speed, evaluate_model

    places = {"dense": str(MODEL), "converted": job.place("converted"), "fine-tuned": job.place("tuned")}
    models: dict[str, dict[str, Any]] = {}
    samples: dict[str, dict[str, str]] = {name: {"prompt": prompt} for name, prompt in PROMPTS.items()}
    with job.stage("measuring"):
        for number, (name, place) in enumerate(places.items()):
            job.progress("measuring", number, len(places))
            model, tokenizer = load(place, device="cpu"), load_tokenizer(place)
            found = evaluate_model(
                model, tokenizer, job.files("held_out"), tokens=job.effort.eval_tokens, batch_size=16, seed=job.seed
            )
            parameters = api.inspect(place)["parameters"]
            models[name] = {
                "loss": {task: numbers["loss"] for task, numbers in found.items()},
                "stored": parameters["stored"],
                "active": parameters["active"],
                "decode_tokens_per_second": decode_speed(model, tokenizer, PROMPTS["docs"], job.effort.new_tokens),
                "directory": place,
            }
            for task, prompt in PROMPTS.items():
                samples[task][name] = continue_text(model, tokenizer, prompt, job.effort.new_tokens)
        job.progress("measuring", len(places), len(places))
    job.result.update(models=models, samples=samples)


def continue_text(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """Return what a causal LM writes after ``prompt``, its most likely token each time."""
    import torch

    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        ids_BT = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=1)
    text: str = tokenizer.decode(ids_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def _export(job: _Run) -> None:
    exports: dict[str, Any] = {}
    with job.stage("exporting"):
        for number, (name, options) in enumerate(EXPORTS.items()):
            job.progress("exporting", number, len(EXPORTS))
            exports[name] = api.export(
                job.place("tuned"), job.place(f"export-{name}"), overwrite=job.overwrite, **options
            )
        job.progress("exporting", len(EXPORTS), len(EXPORTS))
    job.result["exports"] = exports


def _report(job: _Run) -> None:
    path = job.output / REPORT
    with job.stage("writing the report"):
        evaluation = {name: model["loss"] for name, model in job.result["models"].items()}
        write_demo_report(
            path,
            Path(job.place("converted")),
            Path(job.place("tuned")),
            job.files("held_out"),
            job.result["conversion"],
            evaluation,
            job.result["samples"],
            overwrite=job.overwrite,
        )
    job.result["report"] = str(path)


def write_demo_report(
    path: Path,
    converted: Path,
    tuned: Path,
    held_out: Mapping[str, str],
    summary: Mapping[str, Any],
    evaluation: Mapping[str, Mapping[str, float]],
    samples: Mapping[str, Mapping[str, str]],
    *,
    overwrite: bool = False,
) -> None:
    """Write the HTML report of a conversion and its fine-tuning from what they left on disk.

    Of the models only the routers are looked at, with a little of the text that was held out.
    """
    from modmoe.analysis.modules import load_partitions
    from modmoe.analysis.passes.stream import WholeModel
    from modmoe.analysis.profile import load_profiles
    from modmoe.analysis.routing import view_routing
    from modmoe.analysis.run import Analysis, tokenize
    from modmoe.analysis.score import module_scores
    from modmoe.analysis.source import open_source
    from modmoe.analysis.text.calibration import load_task
    from modmoe.analysis.text.reading import Reading
    from modmoe.conversion.modular.steps import make_assignments
    from modmoe.models.ffn_layout import LazyFFNs
    from modmoe.models.loading import load, load_tokenizer
    from modmoe.recipe.schema import load_recipe
    from modmoe.reports.report import write_report
    from modmoe.runtime.progress import silent

    recipe = load_recipe(converted / "modmoe.yaml")
    source = open_source(recipe)
    directory = source.checkpoint.directory
    tokenizer = load_tokenizer(directory)
    profiles = load_profiles(converted / "analysis")
    partitions = load_partitions(converted / "analysis")
    ffns = LazyFFNs(source.checkpoint, source.family, source.num_layers)
    readings: dict[str, Reading] = {}
    batches = tokenize(recipe, source.texts, tokenizer, silent, readings=readings)
    scores_PM = [
        module_scores(recipe.assignment.score, profile, weights, partition)
        for profile, weights, partition in zip(profiles, ffns, partitions, strict=True)
    ]
    runner = WholeModel(load(directory, device="cpu"), source.family)
    analysis = Analysis(source, runner, tokenizer, batches, ffns, profiles, partitions, scores_PM, readings)
    assignments = make_assignments(recipe, analysis)
    members_EM = [assignment.membership_EM for assignment in assignments]
    texts = {name: load_task(name, file) for name, file in held_out.items()}
    views = [
        view_routing(WholeModel(load(place, device="cpu"), source.family), texts, tokenizer, ffns, members_EM)
        for place in (converted, tuned)
    ]
    write_report(
        path,
        recipe,
        analysis,
        assignments=assignments,
        summary={**summary, "output": str(tuned)},
        evaluation=evaluation,
        samples=samples,
        routing=views[0],
        tuned=views[1],
        overwrite=overwrite,
    )
