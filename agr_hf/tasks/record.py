"""The record of a run, `results.json`: what is needed to judge and to repeat it, written by scripts and read by all else.

A file may be a stranger's, so what is in it is checked where it is read, and the same checks hold for what is written.
"""

# No `from __future__ import annotations`: a strict dataclass does not check types that are texts.
import dataclasses
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from agr_hf.environment import environment
from agr_hf.errors import UserError
from agr_hf.files import write_text
from agr_hf.schema import Number, check_entries, find_reason
from agr_hf.tasks.runs import commit, plain

if TYPE_CHECKING:
    import torch

Scalar = bool | int | float | str
Argument = Scalar | list[Scalar]
DEEPEST = 16
NOTEBOOK = "notebook"  # in the place of a script's name
NO_RECORD = (
    "has no results.json: add RecordRun to your Trainer, train under agr-hf run, or with one of agr_hf's scripts; what was "
    "stopped goes on there with --resume_from_checkpoint latest"
)
# Arguments that say where a run goes and not what it is, or that hold a secret: they are not in its record.
NOT_RECORDED = re.compile(
    r"output_dir|logging_dir|run_name|report_to|trackio_.*|resume_from_checkpoint|push_.*|hub_.*"
    r"|(.*[_.])?(token|secret|password|passwd|credentials?|(api|access|secret|private)_?key)([_.].*)?",
    re.IGNORECASE,
)


class Dataset(TypedDict, total=False):
    """What a run was trained and evaluated on; see `describe_dataset`."""

    name: str | None
    hub_id: str | None
    revision: str | None
    config: str | None
    files: list[str] | None
    sha256: list[str | None] | None
    examples: int | None
    split: str | None
    evaluated: int | None
    complete: bool | None


class Gradients(TypedDict, total=False):
    """What AGR did to the gradients; see `summarize_gradients`."""

    measurements: int | None
    overall: dict[str, Number | None] | None
    layers: dict[str, dict[str, Number | None]] | None


class Config(TypedDict, total=False):
    """Those arguments and facts of a run that cards and tables show."""

    learning_rate: Number | None
    hidden_size: int | None
    metric_for_best_model: str | None
    model_class: str | None
    model_name: str | None
    base_model: str | None
    unet: str | None


class Epoch(TypedDict):
    epoch: Number


class Group(TypedDict):
    tensors: int
    parameters: int


def _entries(schema: Any) -> dict[str, Any]:
    """Metadata of a field: a table, or a list of tables, with the entries that a schema names."""
    return {"validator": lambda value: check_entries(value, schema)}


@strict
@dataclasses.dataclass(kw_only=True)
class RunRecord:
    """One run. A field of another type than declared here, or a number that is not finite, is refused.

    Attributes:
        script: name of the script's file; "-m MODULE" for a module, "notebook" where there is no file.
        own_script: whether the script is a user's and not one of the package; see `agr_hf.tasks.own_run`.
        arguments: what its command line gave, by name; see `agr_hf.tasks.recipes.given_arguments`. Words before the first
            name stand under "".
        task: "image-classification", "albert", "ddpm", "functions" or "demo"; of a user's script the Hub's name for what
            the model does, or "other".
        optimizer: its name in `list_optimizers()`, or one of Trainer's own.
        seed: of the run.
        processes: that trained together.
        commit: of the checkout that the package ran from.
        finished: date and time, UTC, ISO 8601.
        seconds: of training.
        peak_memory_bytes: see `peak_memory_bytes`.
        metrics: at the end; None for a number that is not finite.
        dataset: what `describe_dataset` says.
        optimizer_groups: what `optimizer_groups` says.
        gradients: what `summarize_gradients` says.
        epochs: one mapping for each epoch or evaluation, with its "epoch", "step" and metrics.
        details: rows of a table of the task's own.
        config: every argument of the run, and facts such as the number of parameters.
        versions, device, devices, cpu_cores, torch_threads, system: see `agr_hf.environment.environment`.
    """

    script: str
    own_script: bool = False
    arguments: dict[str, Argument]
    task: str
    optimizer: str
    seed: int | None = None
    processes: int | None = None
    commit: str | None = None
    finished: str | None = None
    seconds: Number | None = None
    peak_memory_bytes: int | None = None
    metrics: dict[str, Scalar | None]
    dataset: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=_entries(Dataset))
    optimizer_groups: list[dict[str, Any]] = dataclasses.field(default_factory=list, metadata=_entries(Group))
    gradients: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=_entries(Gradients))
    epochs: list[dict[str, Any]] = dataclasses.field(metadata=_entries(Epoch))
    details: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    config: dict[str, Any] = dataclasses.field(metadata=_entries(Config))
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    device: str | None = None
    devices: int | None = None
    cpu_cores: int | None = None
    torch_threads: int | None = None
    system: str | None = None

    def validate_values(self) -> None:
        """Called when a record is made: what types do not say of numbers, texts and nesting."""
        for field in dataclasses.fields(self):
            _check_values(getattr(self, field.name), field.name)

    @property
    def command(self) -> str:
        """A shell command that repeats the run; empty for a notebook."""
        processes = self.processes or 1
        torchrun = ["torchrun", "--nproc_per_node", str(processes)]
        if self.own_script and self.script == NOTEBOOK:
            return ""
        if self.own_script:
            option, _, module = self.script.partition(" ")
            target = ["-m", module] if option == "-m" else [self.script]
            launcher = ["agr-hf"] if processes == 1 else [*torchrun, "-m", "agr_hf"]
            return shlex.join([*launcher, "run", *target, *argument_words(self.arguments)])
        launcher = ["python"] if processes == 1 else torchrun
        output = ["--output_dir", f"runs/{Path(self.script).stem}"]
        return shlex.join([*launcher, f"training_scripts/{self.script}", *argument_words(self.arguments), *output])

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write `results.json` in a folder, whole or not at all."""
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)
        write_text(Path(folder) / "results.json", text + "\n")


def _check_values(value: Any, where: str, depth: int = 0) -> None:
    """Raise ValueError for what JSON of a run cannot hold, whatever its place."""
    if depth > DEEPEST:
        raise ValueError(f"{where[:60]} is nested too deeply")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which is no finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where} has more than 64 bits, and is larger than any number of a run")
    if isinstance(value, str):
        value.encode("utf-8")  # half a character is no text
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _check_values(key, where, depth + 1)
        _check_values(entry, f"{where}[{key!r}]", depth + 1)


def make_record(
    *, script: str, arguments: Mapping[str, Any], config: Mapping[str, Any], device: "torch.device", **fields: Any
) -> RunRecord:
    """The record of a run that has just ended, with its surroundings.

    No absolute path, user or host name, token or environment variable is in it, and no argument that says where the run
    goes; a number that is not finite becomes None.

    Args:
        script: the script's file.
        arguments: what `given_arguments` says.
        config: every argument of the run.
        device: that it ran on.
        **fields: other fields of `RunRecord`.

    Raises:
        StrictDataclassError: a field has another type than its declaration says.
    """
    found = {
        "script": Path(script).name,
        "arguments": {key: value for key, value in arguments.items() if not NOT_RECORDED.fullmatch(key)},
        "config": {key: value for key, value in config.items() if not NOT_RECORDED.fullmatch(key)},
        "peak_memory_bytes": peak_memory_bytes(device),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        **environment(device),
        **fields,
    }
    return RunRecord(**plain(found))


def read_record(source: str | os.PathLike[str] | bytes) -> RunRecord:
    """The record of a run, from a folder, a file or its bytes.

    Raises:
        UserError: it is not there, not whole, or not of a run; the message says which, in one line.
    """
    if isinstance(source, bytes):
        name, content = "results.json", source
    else:
        path = Path(source)
        path = path / "results.json" if path.is_dir() else path
        name = str(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            if isinstance(error, FileNotFoundError) and Path(source).is_dir():
                raise UserError(f"{source} {NO_RECORD}") from None
            raise UserError(f"{name} cannot be read: {error.strerror}") from None
    try:
        found = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise UserError(f"{name} is nested too deeply to be of a run") from None
    except ValueError as error:
        raise UserError(f"{name} is no JSON of a run: {error}") from None
    declared = {field.name: field for field in dataclasses.fields(RunRecord)}
    table = found if isinstance(found, dict) else {}
    if "command" in table and "script" not in table:
        raise UserError(
            f"{name} is of an older agr_hf, which kept a shell command in the place of arguments; run that command again"
        )
    # null stands for what is not known.
    fields = {key: value for key, value in table.items() if key in declared and value is not None}
    needed = [
        key for key, field in declared.items()
        if dataclasses.MISSING is field.default is field.default_factory and key not in fields
    ]  # fmt: skip
    if needed:
        raise UserError(f"{name} has no {', '.join(needed)}; it is not of a run of agr_hf's scripts")
    try:
        return RunRecord(**fields)
    except (StrictDataclassError, RecursionError) as error:
        raise UserError(f"{name} is not of a run of agr_hf's scripts: {find_reason(error)}") from None


def read_records(folder: str | os.PathLike[str]) -> list[RunRecord]:
    """The records of a demo, whose `results.json` holds several under "runs"; of another folder the only one."""
    path = Path(folder) / "results.json"
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        runs = None
    return [read_record(json.dumps(run).encode()) for run in runs] if isinstance(runs, list) else [read_record(folder)]


def argument_words(arguments: Mapping[str, Argument]) -> list[str]:
    """Arguments as the words of a command line: `--name value`, `--name a b` for a list, true and false in letters.

    An empty list is a flag, a name that begins with a dash is written as it is, and values under "" have no name.
    """
    words = []
    for name, value in arguments.items():
        values = list(map(_word, value if isinstance(value, list) else [value]))
        option = name if name.startswith("-") else f"--{name}"
        if not name:
            words += values
        elif values and values[0].startswith("-"):
            words += [f"{option}={values[0]}", *values[1:]]
        else:
            words += [option, *values]
    return words


def _word(value: Scalar) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def peak_memory_bytes(device: "torch.device") -> int | None:
    """The most memory that this process's tensors took on a CUDA device, or that the process took on a CPU.

    None where the system does not say.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    # kB on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
