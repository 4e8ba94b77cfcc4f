"""Model cards: the header that hubs read, the numbers of the run, and names that cannot become markup."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import clframe
from clframe.api import extend
from clframe.errors import ConfigError, RunFolderError, UnsupportedError
from clframe.targets.card import card_text, escape, push_to_hub, write_card
from clframe.targets.export import without_locations
from clframe.targets.loading import RunModel, load_run

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    overrides = [
        "strategy=er + exits", "components={}", "trainer.epochs=1", "benchmark.experiences=2", "backbone=mlp",
        "trainer.batch_size=64", "trainer.progress=false", "trainer.loggers=[]",
    ]  # fmt: skip
    return Path(clframe.run("quickstart", overrides, output=folder).run_folder)


@pytest.fixture(scope="module")
def card(run):
    return write_card(run, license="mit")


@pytest.fixture(scope="module")
def extended(run, tmp_path_factory):
    """The run after an experience of more samples of all classes."""
    folder = tmp_path_factory.mktemp("extended")
    return Path(extend(run, ["benchmark=digits"], output=folder).run_folder)


def header_of(text):
    start, header, _ = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    assert start == ""
    return yaml.safe_load(header)


def test_the_header_is_what_a_hub_reads(run, card):
    result = clframe.Result.from_json(run / "results.json")
    header = header_of((card / "README.md").read_text())
    assert header["license"] == "mit" and header["library_name"] == "clframe"
    assert header["pipeline_tag"] == "image-classification" and header["datasets"] == ["digits"]
    assert {"continual-learning", "er", "exits"} <= set(header["tags"])
    (entry,) = header["model-index"]
    (measured,) = entry["results"]
    values = {metric["type"]: metric["value"] for metric in measured["metrics"]}
    assert values["accuracy"] == pytest.approx(result.final_average_accuracy, abs=1e-6)
    assert values["forgetting"] == pytest.approx(result.forgetting, abs=1e-6)


def test_the_header_passes_the_hub_library(card):
    hub = pytest.importorskip("huggingface_hub")
    loaded = hub.ModelCard.load(card / "README.md")
    assert loaded.data.license == "mit"
    assert {result.metric_type for result in loaded.data.eval_results} >= {"accuracy", "forgetting"}


def test_the_text_has_matrix_classes_exits_and_command(run, card):
    result = clframe.Result.from_json(run / "results.json")
    text = (card / "README.md").read_text()
    last = result.accuracy_matrix[-1]
    assert f"| experience 2 | {100 * last[0]:.1f} | {100 * last[1]:.1f} |" in text
    record = result.exits[-1]
    for k, name in enumerate(result.exit_names):
        share = 100 * record.macs_K[k] / record.backbone_macs
        accuracy, ece = (100 * record.metrics[metric][k] for metric in ("accuracy", "ece"))
        assert f"| {name} | {record.macs_K[k]:,} | {share:.1f} | {accuracy:.1f} | {ece:.1f} |" in text
    first = result.class_order[0]
    assert f"| {first} | {first} | 1 | {100 * result.accuracy_by_class[first]:.1f} |" in text
    assert "to repeat the run:\n\n```\nclframe run config.yaml\n```" in text and "DIR" not in text
    model = load_run(run, kind=RunModel, where="card")
    moved = replace(model.config, benchmark=replace(model.config.benchmark, options={"data_dir": "sets"}))
    assert (
        "to repeat the run, where DIR is the location of the data:\n\n```\nclframe run config.yaml "
        "benchmark.data_dir=DIR\n```"
    ) in card_text(replace(model, config=moved), result)
    assert f"| torch | {torch.__version__.split('+')[0]}" in text


def test_the_folder_is_a_model(run, card):
    x = torch.randint(0, 17, (9, 1, 8, 8), dtype=torch.uint8)
    loaded, trained = clframe.load(card), clframe.load(run)
    assert all(torch.equal(*pair) for pair in zip(loaded.outputs(x).logits, trained.outputs(x).logits, strict=True))


def test_the_config_of_the_card_repeats_the_run(card):
    from clframe.config.load import load_config

    config = load_config(str(card / "config.yaml"))
    assert config.benchmark.name == "digits" and config.seed == 0 and config.trainer.epochs == 1


def test_a_card_is_not_resumed_and_not_copied_again(card, tmp_path):
    before = sorted(path.name for path in card.iterdir())
    message = f"resume: {card} is a copy of a model without the state of its run; resume the run itself"
    with pytest.raises(RunFolderError, match=re.escape(message)):
        clframe.run(resume=card)
    assert sorted(path.name for path in card.iterdir()) == before
    with pytest.raises(RunFolderError, match="is a copy of a model without the results of its run; give the run"):
        write_card(card, output=tmp_path / "again")


def test_the_card_of_an_extended_run_names_no_folders_and_first_experiences(run, extended, tmp_path):
    card = write_card(extended, output=tmp_path / "card")
    result = clframe.Result.from_json(extended / "results.json")
    assert set(result.experiences[2]) == set(result.class_order)
    text = (card / "README.md").read_text()
    rows = [re.search(rf"^\| {c} \| {c} \| (\d) \|", text, re.MULTILINE) for c in result.class_order]
    assert [int(row[1]) for row in rows] == [1] * 5 + [2] * 5
    (entry,) = yaml.safe_load((card / "config.yaml").read_text())["earlier"]
    assert entry["run"] == run.name and str(run) in (extended / "config.yaml").read_text()
    assert clframe.load(card).class_order == clframe.load(extended).class_order


def test_locations_of_earlier_data_are_reduced_to_their_last_part(extended):
    config = load_run(extended, kind=RunModel, where="card").config
    places = {"path": "/home/me/photos", "data_dir": "/data/sets", "size": 32}
    (entry,) = config.earlier
    entry = replace(entry, run="/home/me/runs/first", benchmark=replace(entry.benchmark, options=places))
    (found,) = without_locations(replace(config, earlier=(entry,))).earlier
    assert found.run == "first" and found.benchmark.options == {"path": "photos", "data_dir": "sets", "size": 32}
    assert replace(found, run=entry.run, benchmark=entry.benchmark) == entry


@pytest.mark.parametrize(("mean", "line"), [(0.25, True), (1.0, False), (None, False)])
def test_the_mean_cost_of_decisions_is_stated_where_it_differs(run, tmp_path, mean, line):
    result = clframe.Result.from_json(run / "results.json")
    macs = None if mean is None else mean * result.macs
    costs = {"totals": {"prediction": {"whole": result.macs, "mean": macs}}}
    (tmp_path / "ledger.json").write_text(json.dumps(costs))
    text = card_text(replace(load_run(run, kind=RunModel, where="card"), folder=tmp_path), result)
    assert ("Mean cost of a prediction by the decision rule" in text) == line
    if line:
        assert f"on the test data: {macs:,.0f} MACs, 25.0 % of that with all exits." in text


def test_names_from_data_cannot_become_markup(run):
    evil = "a|b\n---\nlicense: other\n![x](http://evil.example/p.png) <script>alert(1)</script> `c`"
    model = load_run(run, kind=RunModel, where="card")
    result = clframe.Result.from_json(run / "results.json")
    names = (evil, *(str(c) for c in range(1, 10)))
    text = card_text(replace(model, class_names=names), replace(result, name=evil, benchmark=evil), license="mit")
    header = header_of(text)
    one_line = " ".join(evil.split())
    assert header["license"] == "mit" and header["datasets"] == [one_line]
    assert header["model-index"][0]["name"] == one_line
    body = text.partition("\n---\n")[2]
    assert "<script>" not in body and not re.search(r"(?<!\\)\[x|(?<!\\)\]\(http", body)
    rows = [line for line in body.splitlines() if line.startswith("| 0 |")]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 5


def test_escape_leaves_words_and_numbers():
    assert escape("small cnn 32") == "small cnn 32"
    assert escape("a\x00b\u202ec\nd") == "abc d"


class Client:
    def __init__(self, error=None):
        self.calls, self.error = [], error

    def create_repo(self, repo, **options):
        if self.error is not None:
            raise self.error
        self.calls.append(("create", repo, options))
        return f"https://hub.example/{repo}"

    def upload_folder(self, **options):
        self.calls.append(("upload", options["repo_id"], sorted(path.name for path in Path(options["folder_path"]).iterdir())))


def test_pushing_uploads_the_folder_to_a_private_repository(card):
    client = Client()
    assert push_to_hub(card, "me/digits", client=client) == "https://hub.example/me/digits"
    assert client.calls == [
        ("create", "me/digits", {"private": True, "exist_ok": True}),
        ("upload", "me/digits", ["README.md", "config.yaml", "model.json", "model.safetensors"]),
    ]


def test_a_refusal_of_the_hub_is_one_line(card):
    with pytest.raises(UnsupportedError, match="the hub refused me/digits .401 Unauthorized line.; log in") as caught:
        push_to_hub(card, "me/digits", client=Client(OSError("401 Unauthorized\nline")))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="give USER/NAME"):
        push_to_hub(card, "digits; rm", client=Client())


def test_bad_input_is_refused(run, tmp_path, monkeypatch):
    with pytest.raises(RunFolderError, match="card: no folder"):
        write_card(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="--license found 'a\nb'"):
        write_card(run, output=tmp_path / "out", license="a\nb")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(RunFolderError, match="exists; give another --output"):
        write_card(run, output=tmp_path / "full")
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    (unfinished / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(RunFolderError, match="has no checkpoint yet"):
        write_card(unfinished)
    for path in (run / "checkpoints").iterdir():
        (unfinished / "checkpoints" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RunFolderError, match="has no results.json; finish the run"):
        write_card(unfinished)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnsupportedError, match=r"huggingface_hub; pip install 'clframe\[hub\]'"):
        push_to_hub(tmp_path, "me/digits")
