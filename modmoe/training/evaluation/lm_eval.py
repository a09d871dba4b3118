"""Tasks of the lm-evaluation-harness on any model that this package can open.

    lm-eval, https://github.com/EleutherAI/lm-evaluation-harness

The model is opened here and handed over as an object: lm-eval would open a checkpoint by transformers alone, which
knows neither an adapter of ours nor the expert that a model routed by task is to use.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from modmoe.errors import CheckpointError, RecipeError, did_you_mean
from modmoe.models.loading import check_models, load, load_tokenizer
from modmoe.models.tokenizer_files import REMEDY, files_of
from modmoe.runtime import ranks
from modmoe.runtime.progress import Progress
from modmoe.storage.bounded import ask_in_bounds
from modmoe.storage.documents import check_tree
from modmoe.training.evaluation.task_loss import expert_of, reading

_log = logging.getLogger(__name__)


def evaluate_harness(
    source: str,
    names: Sequence[str],
    *,
    path: str | None = None,
    limit: int | None = None,
    baseline: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    trust_remote_code: bool = False,
    expert: str | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run lm-eval's tasks on a checkpoint, as ``modmoe eval --harness --json`` prints it.

    Tasks are built before a model is opened. Python files that a task names are executed, as lm-eval does.

    Args:
        source: a dense, tied, packed or native checkpoint, or an adapter directory.
        names: tasks, groups or tags.
        path: a folder of task files (.yaml); where it has all the names, lm-eval's own tasks are not looked at.
        limit: at most so many samples of each task.
        baseline: a checkpoint that gets the same tasks.
        batch_size: requests of a batch.
        device: ``auto``, ``cpu`` or ``cuda``.
        trust_remote_code: allow the checkpoint's own code to run.
        expert: as for ``evaluate``: by default a model routed by task uses the expert of the task's name.
        seed: of examples that are drawn; None leaves lm-eval its own, with which published results were made.
        progress: called with a message.

    Returns ``lm_eval``, its version, and ``tasks: {NAME: {version, shots, samples, metrics}}`` with ``metrics:
    {METRIC: {value, stderr, higher_is_better}}``; stderr is None where lm-eval has none. A metric of a filter that a
    task names is called METRIC,FILTER. With a ``baseline``, ``baseline`` holds the same for it, and each metric has
    ``difference``, its value less the baseline's.

    Raises:
        RecipeError: lm-eval is not installed; a task is unknown or cannot be built or run; no such device or expert.
        CheckpointError: a model cannot be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("--harness", "lm-eval is not installed", "pip install 'modmoe[eval]'")
    if ranks.num_ranks() > 1:
        raise RecipeError("--harness", "runs in one process", "leave the launcher out")
    with _quiet_lm_eval():
        if progress is not None:
            progress("building the tasks of lm-eval")
        built = _build(names, path)

        def measure(place: str, expert: str | None) -> dict[str, Any]:
            if progress is not None:
                progress(f"loading {place}")
            model = load(place, trust_remote_code=trust_remote_code, device=device)
            tokenizer = load_tokenizer(place, trust_remote_code=trust_remote_code)
            experts = {name: expert_of(model, name, expert) for name in built}  # before the first has taken its time
            found = {}
            for name, tasks in built.items():
                report = None if progress is None else partial(progress, f"running {name}, requests")
                reader = _reader(model, tokenizer, batch_size, report)
                with reading(model, experts[name]), _tokenizes_in_bounds(reader, tokenizer):
                    found.update(_run(name, tasks, reader, limit, seed))
            return found

        check_models([source, baseline], trust_remote_code=trust_remote_code)
        found = measure(source, expert)
        result = {"lm_eval": version("lm_eval"), "tasks": found}
        if baseline is not None:
            result["baseline"] = wanted = measure(baseline, None)
            for name, task in found.items():
                for metric, numbers in task["metrics"].items():
                    numbers["difference"] = _difference(numbers, wanted[name]["metrics"][metric])
    return result


def _build(names: Sequence[str], path: str | None) -> dict[str, Any]:
    """Return what lm-eval makes of each name: a group, or one task or several."""
    from lm_eval.tasks import TaskManager

    if path is not None and not os.path.isdir(path):
        raise RecipeError("--harness-path", f"{path}: no such folder")
    if path is not None:
        check_tree(Path(path))
    manager = TaskManager(include_path=path, include_defaults=path is None)
    if path is not None and not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=path)  # theirs are thousands of files
    built = {}
    for name in names:
        if name not in manager.all_tasks:
            near = did_you_mean(name, manager.all_tasks)
            remedy = near if "Did you mean" in near else "Tasks of your own lie in the folder of --harness-path."
            raise RecipeError("--harness", f"lm-eval has no task '{name}'", remedy)
        try:
            built[name] = manager.load([name])
        except Exception as error:  # a task's files may fail in any way
            reason = " ".join(str(error).split())
            raise RecipeError("--harness", f"{name}: lm-eval cannot build it: {reason[:300]}") from error
    return built


def _reader(model: Any, tokenizer: Any, batch_size: int, report: Callable[[int, int], None] | None) -> Any:
    """Return lm-eval's view of a model, which reports the requests answered and draws no bars of its own."""
    from lm_eval.models.huggingface import HFLM

    part = 32 * batch_size
    """Requests between two reports; lm-eval puts those of like length together within."""

    class Reader(HFLM):  # type: ignore[misc]
        ask: Callable[[Any], Any] | None = None
        """Has the tokenizer do something in a process that has bounds."""

        def _tokenizer(self, name: str, *arguments: Any, **options: Any) -> Any:
            if self.ask is None:
                return getattr(HFLM, name)(self, *arguments, **options)
            return self.ask([name, [_plain(argument) for argument in arguments], options])

        def tok_encode(self, *arguments: Any, **options: Any) -> Any:
            return self._tokenizer("tok_encode", *arguments, **options)

        def tok_decode(self, *arguments: Any, **options: Any) -> Any:
            return self._tokenizer("tok_decode", *arguments, **options)

        def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
            return self._tokenizer("apply_chat_template", *arguments, **options)

        def tok_batch_encode(self, *arguments: Any, **options: Any) -> Any:
            ids_and_mask = self._tokenizer("tok_batch_encode", *arguments, **options)
            return tuple(torch.as_tensor(values, dtype=torch.int64) for values in ids_and_mask)

        def _in_parts(self, answer: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
            found: list[Any] = []
            for start in range(0, len(requests), part):
                if report is not None:
                    report(start, len(requests))
                found += answer(requests[start : start + part], disable_tqdm=True)
            if report is not None:
                report(len(requests), len(requests))
            return found

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return self._in_parts(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            return self._in_parts(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            return self._in_parts(super().generate_until, requests)

        def _loglikelihood_tokens(self, *args: Any, **options: Any) -> Any:
            return super()._loglikelihood_tokens(*args, **{**options, "disable_tqdm": True})

    return Reader(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@contextlib.contextmanager
def _tokenizes_in_bounds(reader: Any, tokenizer: Any) -> Iterator[None]:
    """Let a reader's tokenizer, which a stranger may have written, work in a child process within bounds."""
    kind = type(reader).__mro__[1]

    def answer(question: Any) -> Any:
        name, arguments, options = question
        return _plain(getattr(kind, name)(reader, *arguments, **options))

    place, remedy = files_of(tokenizer), REMEDY
    with ask_in_bounds(answer, place=place, remedy=remedy) as ask:
        reader.ask = ask
        try:
            yield
        finally:
            reader.ask = None


def _plain(value: Any) -> Any:
    """Return a value with lists for its tensors."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _run(name: str, tasks: Any, reader: Any, limit: int | None, seed: int | None) -> dict[str, Any]:
    """Return each task's numbers; as ``lm_eval.simple_evaluate``, but for its questions to git and to the system."""
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    seed = DEFAULT_OTHER_SEED if seed is None else seed
    set_seed(seed)
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    try:
        results = evaluate(reader, tasks, limit=limit, log_samples=False)
    except CheckpointError:
        raise
    except (AssertionError, ValueError) as error:  # a prompt too long for the model, code that would be executed...
        reason = " ".join(str(error).split())
        raise RecipeError("--harness", f"{name}: lm-eval stopped: {reason[:300]}") from error
    return {task: _task(task, numbers, results) for task, numbers in results["results"].items()}


def _task(task: str, numbers: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Return one task's numbers by metric; lm-eval's keys are ``acc,none`` and ``acc_stderr,none``."""
    metrics = {}
    for key, value in numbers.items():
        metric, comma, method = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = numbers.get(f"{metric}_stderr,{method}")
        metrics[metric if method == "none" else key] = {
            "value": value,
            "stderr": stderr if isinstance(stderr, float) else None,  # it may be "N/A"
            "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
        }
    samples = results["n-samples"].get(task, {}).get("effective")
    return {
        "version": results["versions"].get(task),
        "shots": results["n-shot"].get(task),
        "samples": samples,
        "metrics": metrics,
    }


def _difference(numbers: dict[str, Any], wanted: dict[str, Any]) -> float | None:
    both = numbers["value"], wanted["value"]
    return both[0] - both[1] if all(isinstance(value, int | float) for value in both) else None


class _ToOurs(logging.Handler):
    """Repeats lm-eval's log lines as our own of the lowest level."""

    def emit(self, record: logging.LogRecord) -> None:
        _log.debug("lm-eval: %s", record.getMessage())


@contextlib.contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    theirs, handler = logging.getLogger("lm_eval"), _ToOurs()
    before = theirs.propagate
    theirs.addHandler(handler)
    theirs.propagate = False
    try:
        yield
    finally:
        theirs.removeHandler(handler)
        theirs.propagate = before
