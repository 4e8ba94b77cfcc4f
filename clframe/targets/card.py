"""Model cards: a folder with README.md, weights and config, as model hubs and ``clframe.load`` read it.

Names of classes, runs and data sets come from users' files: in the YAML header they are quoted by the YAML library, in
Markdown every punctuation mark is escaped, so that none becomes a link, an image, HTML or a further table cell.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from clframe.environment import versions
from clframe.errors import ConfigError, RunFolderError, UnsupportedError, reason_of
from clframe.files import write_atomically
from clframe.metrics.registry import all_metrics
from clframe.report.expert_costs import expert_costs
from clframe.results import Result
from clframe.run_folder import RunFolder
from clframe.tables import Quantity, Table, to_markdown
from clframe.targets.export import DESCRIPTION, describe, write_weights
from clframe.targets.export_folder import new_folder
from clframe.targets.export_graphs import stored_dtype
from clframe.targets.loading import RunModel, load_run, refuse_language_model
from clframe.targets.portable import is_portable

CARD = "README.md"
MOST_ROWS = 100
"""Classes up to which the card lists each one; ``model.json`` has all."""


def write_card(run: str | Path, *, output: str | Path | None = None, license: str = "unknown") -> Path:
    """Write the model card of a finished run with its weights and config; the verb ``clframe card``.

    Args:
        run: A run folder.
        output: The folder to create; None is ``RUN/card``.
        license: Identifier of the license of the weights, as the hub lists them, such as ``mit``.

    Returns:
        The folder, which ``clframe.load`` reads.

    Raises:
        RunFolderError: No run, an unfinished run, or a folder that has content.
        ConfigError: A license that is not an identifier.
        UnsupportedError: safetensors is not installed.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ConfigError(f"card: --license found '{license}'; give an identifier such as mit, apache-2.0 or other")
    model = load_run(run, kind=RunModel, where="card")
    refuse_language_model(model.network, where="card")
    results = model.folder / "results.json"
    if is_portable(model.folder):
        raise RunFolderError(f"card: {run} is a copy of a model without the results of its run; give the run itself")
    if not results.is_file():
        raise RunFolderError(f"card: {run} has no results.json; finish the run with clframe run --resume {run}")
    result = Result.from_json(results)
    folder = Path(output).expanduser() if output is not None else model.folder / "card"
    with new_folder(folder, where="card") as fresh:
        write_weights(model, model.config, fresh)
        description = {
            **describe(model, config=model.config, dtype=stored_dtype(model)), "format": "safetensors",
        }  # fmt: skip
        write_atomically(fresh / DESCRIPTION, json.dumps(description, indent=1) + "\n")
        write_atomically(fresh / CARD, card_text(model, result, license=license))
    return folder


def push_to_hub(folder: str | Path, repo: str, *, public: bool = False, client: Any = None) -> str:
    """Upload the folder of a card to the Hugging Face hub, in a new or an existing repository.

    Args:
        folder: The folder of :func:`write_card`.
        repo: ``USER/NAME``.
        public: Whether a new repository is public.
        client: A ``huggingface_hub.HfApi``; None makes one, with the stored login.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: A name that is not ``USER/NAME``.
        UnsupportedError: huggingface_hub is not installed, or the hub refuses.
    """
    require_repository(repo)
    client = hub_client() if client is None else client
    try:
        address = str(client.create_repo(repo, private=not public, exist_ok=True))
        client.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Model card and weights")
    except Exception as error:  # connection, login, permission: the client has many kinds
        reason = reason_of(error, most=200)
        raise UnsupportedError(
            f"card: the hub refused {repo} ({reason}); log in with 'hf auth login'; the card is in {folder}"
        ) from error
    return address


def require_repository(repo: str) -> None:
    """Check the form of a repository's name.

    Raises:
        ConfigError: Not ``USER/NAME``.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo) or len(repo) > 96:
        raise ConfigError(f"card: --push-to-hub found '{repo}'; give USER/NAME")


def hub_client() -> Any:
    """Make a client of the Hugging Face hub.

    Raises:
        UnsupportedError: huggingface_hub is not installed.
    """
    try:
        return importlib.import_module("huggingface_hub").HfApi()
    except ImportError as error:
        raise UnsupportedError(
            "card: --push-to-hub found no usable package huggingface_hub; pip install 'clframe[hub]'"
        ) from error


def card_text(model: RunModel, result: Result, *, license: str = "unknown") -> str:
    """Render README.md of a run: YAML header and Markdown."""
    header = yaml.safe_dump(
        _header(model, result, license=license), sort_keys=False, allow_unicode=True, width=math.inf
    )
    sections = [
        f"# {escape(result.name)}",
        _summary(model, result),
        "## Use\n\n" + _use(),
        "## Results\n\n" + "\n".join(to_markdown(table) for table in _result_tables(model, result)),
        "## Intended use and limits\n\n" + _limits(result),
        "## Training\n\n" + _training(model, result),
    ]
    return f"---\n{header}---\n\n" + "\n\n".join(section.strip() for section in sections) + "\n"


def escape(text: str) -> str:
    r"""Escape text for Markdown: one line, no control characters, every punctuation mark literal.

    >>> escape("a|b [x](http://y)\n<img>")
    'a\\|b \\[x\\]\\(http\\:\\/\\/y\\) &lt;img&gt;'
    """
    line = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([!-%'-/:=?@\[-`{-~])", r"\\\1", line)


def _one_line(text: str) -> str:
    """Text without line breaks and control characters: a line ``---`` would end the header."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def _header(model: RunModel, result: Result, *, license: str) -> dict[str, Any]:
    task = _task(model)
    labels = all_metrics()
    metrics = [
        {"type": name, "name": labels[name].label if name in labels else name, "value": round(float(value), 6)}
        for name, value in result.metrics.items()
        if math.isfinite(value) and name != "final_average_accuracy"
    ]
    accuracy = result.metrics.get("final_average_accuracy", math.nan)
    if math.isfinite(accuracy):
        metrics.insert(0, {"type": "accuracy", "name": "final average accuracy", "value": round(accuracy, 6)})
    components = sorted(component.name for component in model.learner.composition)
    name, data = _one_line(result.name), _one_line(result.benchmark)
    return {
        "license": license,
        "library_name": "clframe",
        "pipeline_tag": task,
        "tags": ["continual-learning", model.config.benchmark.protocol.replace("_", "-"), *components],
        "datasets": [data],
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": task, "name": model.config.benchmark.protocol.replace("_", " ")},
                        "dataset": {"name": data, "type": data},
                        "metrics": metrics,
                    }
                ],
            }
        ],
    }


def _task(model: RunModel) -> str:
    if not model.std or (model.inputs is not None and model.inputs.kind in ("words", "tokens")):
        return "text-classification"
    return "image-classification" if len(model.network.input_shape) == 3 else "tabular-classification"


def _summary(model: RunModel, result: Result) -> str:
    shape = " x ".join(map(str, model.network.input_shape))
    classes = model.network.classes
    lines = [
        f"A {escape(result.backbone)} network that learned {classes} classes of {escape(result.benchmark)} in "
        f"{len(result.experiences)} experiences ({escape(model.config.benchmark.protocol)}) with the "
        f"continual-learning strategy {escape(result.strategy)}, trained with clframe.",
        "",
        f"- Inputs: {stored_dtype(model)} of shape {shape}, as the data set stores them, without normalization.",
        f"- Outputs: probabilities of {classes} classes, at the exits {escape(', '.join(model.network.exit_names))}.",
        f"- Parameters: {result.parameters:,}.",
    ]
    if result.macs is not None:
        lines.append(f"- Cost of a prediction with all exits: {result.macs:,} multiply-adds (MACs).")
    experts = expert_costs(model.folder)
    mean = RunFolder(model.folder).mean_prediction_macs() if experts is None else experts.mean
    if mean is not None:
        share = f", {100 * mean / result.macs:.1f} % of that with all exits" if result.macs else ""
        if experts is not None:
            share = f"{experts.counted}, {experts.share}"
        lines.append(
            f"- Mean cost of a prediction by the decision rule, which selects exits or experts for each sample, on the "
            f"test data: {mean:,.0f} MACs{share}. The metrics below are those of this rule."
        )
    return "\n".join(lines)


def _use() -> str:
    return (
        "```python\n"
        "import clframe\n\n"
        'model = clframe.load("FOLDER")  # the folder of this file; from a hub: huggingface_hub.snapshot_download\n'
        "classes = model.classify(images)  # ids of classes; images as the data set stores them, batch first\n"
        "```\n\n"
        "`model.json` lists the ids and names of the classes, the normalization and the cost of each exit. The weights "
        "hold no training data, so the model cannot be trained further."
    )


def _result_tables(model: RunModel, result: Result) -> list[Table]:
    labels = all_metrics()
    rows = [
        (labels[name].label if name in labels else name, _quantity(result, name))
        for name in result.metrics
    ]  # fmt: skip
    tables = [
        Table(name="summary", title="Metrics on the test data, in percent", columns=("metric", "value, %"),
              rows=tuple(rows)),
        _matrix_table(result),
        _class_table(model, result),
    ]  # fmt: skip
    return [*tables, _exit_table(result)] if result.exits else tables


def _quantity(result: Result, name: str) -> Quantity:
    score = result.score(name)
    metric = all_metrics().get(name)
    return Quantity(score.value, kind="percent" if metric is None else metric.kind, undefined=score.undefined)


def _matrix_table(result: Result) -> Table:
    count = len(result.accuracy_matrix[0]) if result.accuracy_matrix else 0
    return Table(
        name="accuracy_matrix", title="Accuracy on each experience's test data after each experience, in percent",
        note="Row t: after training on experience t. Above the diagonal are experiences that were not learned yet.",
        columns=("after", *(f"experience {e + 1}" for e in range(count))),
        rows=tuple(
            (f"experience {t + 1}", *(Quantity(value, undefined="not evaluated") for value in row))
            for t, row in enumerate(result.accuracy_matrix)
        ),
    )  # fmt: skip


def _class_table(model: RunModel, result: Result) -> Table:
    order = result.class_order[:MOST_ROWS]
    rest = len(result.class_order) - len(order)
    names = model.class_names or result.class_names
    experience: dict[int, int] = {}
    for k, classes in enumerate(result.experiences):
        for c in classes:
            experience.setdefault(c, k + 1)  # later experiences may bring more samples of a class
    return Table(
        name="classes", title="Classes in the order in which they were learned, with final accuracy in percent",
        note=f"{rest} further classes are in model.json." if rest else "",
        columns=("class", "name", "experience", "accuracy, %"),
        rows=tuple(
            (
                str(c), names[c] if c < len(names) else "", str(experience.get(c, "")),
                Quantity(result.accuracy_by_class.get(c, math.nan), undefined="no test samples"),
            )
            for c in order
        ),
    )  # fmt: skip


def _exit_table(result: Result) -> Table:
    last = result.exits[-1]

    def value(name: str, k: int) -> Quantity:
        found: Sequence[float] = last.metrics.get(name, ())
        return Quantity(found[k] if k < len(found) else math.nan, undefined="not recorded")

    return Table(
        name="exits", title="Cost, accuracy and calibration of each exit",
        note="MACs of one sample up to and including the exit. ECE: expected calibration error, lower is better.",
        columns=("exit", "MACs", "share of the backbone, %", "accuracy, %", "ECE, %"),
        rows=tuple(
            (
                name, Quantity(last.macs_K[k], kind="whole"), Quantity(last.macs_K[k] / last.backbone_macs),
                value("accuracy", k), value("ece", k),
            )
            for k, name in enumerate(result.exit_names)
        ),
    )  # fmt: skip


def _limits(result: Result) -> str:
    lines = [
        "- The model was written by `clframe card` from the files of one run, without a review of what it is fit for. "
        "Describe the intended use here before passing it on.",
        "- It assigns every input to one of the classes above, also inputs of other classes.",
        "- The numbers above are those of one seed, on test data of the same origin as the training data. Measure "
        "accuracy on your own data (`clframe evaluate`) before relying on it.",
        "- Classes learned early may be recognized less often than late ones, see the accuracy matrix.",
    ]
    if result.diverged:
        lines.append("- Training diverged in at least one experience; see results.json of the run.")
    return "\n".join(lines)


def _training(model: RunModel, result: Result) -> str:
    found = {**versions(), **result.versions}
    table = Table(
        name="versions", title="Versions", columns=("package", "version"),
        rows=tuple((name, str(version)) for name, version in found.items()),
    )  # fmt: skip
    words = ["clframe", "run", "config.yaml"]
    options = model.config.benchmark.options
    places = [f"benchmark.{key}=DIR" for key in ("data_dir", "path", "tokens") if options.get(key)]
    where = ", where DIR is the location of the data" if places else ""
    return (
        f"Seed {result.seed}, {result.steps:,} optimizer steps, {result.train_seconds:,.0f} s of training. The "
        f"complete config is `config.yaml`; to repeat the run{where}:\n\n"
        f"```\n{shlex.join([*words, *places])}\n```\n\n" + to_markdown(table)
    )
