"""Invalid config files: one line with the file, what was found and what to do.

Nothing here reaches training: whatever can be checked is checked before a run folder is made.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("no_training")

FILES = [
    ("a: [1, 2\n b: }", "invalid YAML (", " in line 2); fix the file"),
    ("seed: 1\nseed: 2\n", "invalid YAML (found duplicate key seed in line 2); fix the file"),
    ("seed: 1\n---\nseed: 2\n", "invalid YAML (but found another document", "; fix the file"),
    ("- er\n- lwf\n", "not a mapping of keys to values; write lines like 'strategy: er'"),
    ("er + lwf\n", "not a mapping of keys to values; write lines like"),
    ("3\n", "not a mapping of keys to values; write lines like"),
    ("", "config: has no benchmark; set benchmark=NAME, or put benchmark/NAME into the defaults of its"),
    ("benchmark: {name: digits}\n", "config: has no backbone; set backbone=NAME"),
    ("benchmark: digits\nbackbone: {name: mlp}\n", "benchmark is 'digits' (text); give a mapping such as"),
    ("benchmark: {experiences: 2}\nbackbone: {name: mlp}\n", "benchmark.name: found '' (text); give a name"),
    ("trainer:\n", "trainer is null; give a mapping"),
    ("tainer: {epochs: 3}\n", "my.yaml: unknown key 'tainer'; did you mean 'trainer'?"),
    ("trainer: {epoch: 3}\n", "my.yaml: unknown key 'trainer.epoch'; did you mean 'trainer.epochs'?"),
    ("3: 4\n", "my.yaml: unknown key '3'; keys are backbone"),
    ("trainer: {3: 4}\n", "my.yaml: unknown key 'trainer.3'; keys are accelerator"),
    ("_target_: os.system\n", "my.yaml: unknown key '_target_'; "),
    ("defaults: [experiment/quickstart]\ncomponents: {er: {3: 4}}\n", "components.er.3: unknown option;"),
    ("defaults: [experiment/quickstart]\nbackbone: {3: 4}\n", "backbone.3: unknown option; options are"),
    ("defaults: [my.yaml]\n", "my.yaml: defaults form a circle (my > my); remove one of them"),
    ("defaults: [../here/my.yaml]\n", "my.yaml: defaults form a circle (my > my); remove one of"),
    ("defaults: [benchmark/digts]\n", "my.yaml: defaults: unknown config 'benchmark/digts'; did you mean"),
    ("defaults: [digits]\n", "my.yaml: defaults: 'digits' is not an experiment; did you mean"),
    ("defaults: [nowhere.yaml]\n", "my.yaml: defaults: no file 'nowhere.yaml';"),
    ("defaults: backbone/mlp\n", "my.yaml: defaults is 'backbone/mlp' (text); give a list such as"),
    ("defaults: {a: b}\n", "my.yaml: defaults is {'a': 'b'} (a mapping); give a list"),
    ("defaults: [3]\n", "my.yaml: defaults has 3; write group/name, such as backbone/mlp"),
    ("defaults: [[backbone/mlp]]\n", "my.yaml: defaults has ['backbone/mlp'] (a list); write"),
    ("defaults: ['${oc.env:HOME}']\n", "my.yaml: defaults.0 is '${oc.env:HOME}' (text), more than a"),
    ("components: ${oc.env:HOME}\n", "my.yaml: components is '${oc.env:HOME}' (text), more than a"),
    ("seed: 0\nname: ${seed}${oc.env:HOME}\n", "my.yaml: name is '${seed}${oc.env:HOME}' (text), more"),
    ("defaults: [experiment/quickstart]\nname: ???\n", "my.yaml: name is ???; give it a value"),
    ("name: !!python/object/apply:os.system ['touch hacked']\n", "invalid YAML (could not determine a"),
    ("name: !!timestamp 2020-01-01\n", "my.yaml: invalid YAML (", "; fix the file"),
    ("trainer: &t {callbacks: *t}\n", "my.yaml: invalid YAML (", "; fix the file"),
    ("strategy: " + "[" * 900 + "]" * 900, "my.yaml: invalid YAML (", "recursion", "; fix the"),
    ("defaults: [experiment/quickstart]\noptimizer: {lr: .inf}\n", "optimizer.lr: found inf; give a"),
]  # fmt: skip


@pytest.mark.parametrize("text, messages", [(text, messages) for text, *messages in FILES], ids=lambda v: repr(v)[:60])
def test_file(text, messages, refused, here):
    (here / "my.yaml").write_text(text)
    refused(["run", "my.yaml"], *messages, lines=1 if text else 2)  # an empty file lacks benchmark and backbone


def test_a_circle_over_two_files_is_shown(refused, here):
    (here / "a.yaml").write_text("defaults: [b.yaml]\n")
    (here / "b.yaml").write_text("defaults: [./a.yaml]\n")
    refused(["run", "a.yaml"], "defaults form a circle (a > b > a); remove one of them")


def test_a_file_that_is_no_text(refused, here):
    (here / "my.yaml").write_bytes(b"\xff\xfe\x00\x01")
    refused(["run", "my.yaml"], "my.yaml: invalid YAML ('utf-8' codec", "; fix the file")


def test_a_folder_called_like_a_config(refused, here):
    (here / "my.yaml").mkdir()
    refused(["run", "my.yaml"], "config: no file 'my.yaml'; give a file")


def test_the_nearest_file_is_offered(refused, here):
    (here / "mine.yml").write_text("")
    refused(["run", "mine.yaml"], "config: no file 'mine.yaml'; did you mean 'mine.yml'?")


def test_a_swapped_file_without_the_block(refused, here):
    (here / "other.yaml").write_text("seed: 3\n")
    refused(["run", "quickstart", "backbone=other.yaml"],
            "override 'backbone=other.yaml': other.yaml has no key 'backbone'; give a file that")  # fmt: skip
