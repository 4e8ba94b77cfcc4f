"""docs/sweeps.md shows sweeps that exist, and the stored numbers of sweep files are those of docs/results.md."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
import yaml

from clframe.cli import reproduce, sweep
from clframe.config.files import shipped_configs
from clframe.sweep.expected import read_expected, restrict
from clframe.sweep.file import find_sweep, read_sweep
from clframe.sweep.plan import check_axes, check_settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
FILES = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [shlex.split(line) for line in re.findall(r"^\$ clframe (.*)$", TEXT, flags=re.MULTILINE)]


def parse(verb, words):
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    verb.add_options(parser)
    options, rest = parser.parse_known_args(words)
    assert not [word for word in rest if word.startswith("-")]
    options.words += rest
    return options


def test_its_files_are_sweeps_whose_configs_load(tmp_path):
    counts = []
    for text in FILES:
        file = read_sweep(yaml.safe_load(text), tmp_path / "s.yaml")
        checked = check_settings(file.space.config, file.space.settings())
        check_axes(checked)
        counts.append(len({one.digest for one in checked}))
        if file.expected:
            assert all(restrict(file.space, row.setting).settings() for row in read_expected(file).rows)
    assert counts == [4, 1, 2]


def test_its_commands_are_accepted(here):
    (here / "my_sweep.yaml").write_text(FILES[0])
    for verb, *words in COMMANDS:
        if verb == "sweep" and "--status" not in words:
            options = parse(sweep, words)
            assert sweep.read_space(options).settings() and options.folder
            if options.launcher != "local":
                pytest.importorskip({"ray": "ray", "slurm": "submitit"}[options.launcher])
            sweep.make_launcher(options)
        elif verb == "reproduce":
            name, _, row = parse(reproduce, words).words[0].partition(":")
            assert read_expected(find_sweep(f"sweep/{name}")).row(row)
    assert {command[0] for command in COMMANDS} == {"sweep", "report", "reproduce"}


def test_the_first_commands_train_as_many_cells_as_it_says():
    spaces = [sweep.read_space(parse(sweep, words)) for _, *words in COMMANDS[:2]]
    cells = [{(tuple(setting.items()), seed) for setting in space.settings() for seed in space.seeds} for space in spaces]
    assert len(cells[0]) == 20 and len(cells[1] - cells[0]) == 40
    for text, count in (("benchmark.counts=[2,3,5],[5,5]", 2), ("strategy=er(memory=50, ratio=2),lwf", 2)):
        assert len(sweep.parse_words([text])[0].popitem()[1]) == count


@pytest.mark.parametrize("path", sorted((shipped_configs() / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_stored_numbers_are_those_of_the_published_table(path):
    file = find_sweep(f"sweep/{path.stem}")
    expected = read_expected(file)
    heading = expected.source.removeprefix("docs/results.md, ")
    section = re.search(rf"^## {re.escape(heading)}.*?(?=^## |\Z)", RESULTS, flags=re.MULTILINE | re.DOTALL)
    assert section, heading
    for row in expected.rows:
        assert restrict(file.space, row.setting).settings()
        (line,) = re.findall(rf"^\| `{re.escape(row.name)}` \|(.*)$", section[0], flags=re.MULTILINE)
        published = [float(number) for number in re.findall(r"([\d.]+) ± ", line)]
        stored = [100 * row.metrics[metric] for metric in ("final_average_accuracy", "forgetting")]
        assert [round(number, 1) for number in stored] == published[:2]
