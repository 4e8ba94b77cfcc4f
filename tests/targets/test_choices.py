"""Multiple-choice questions: likelihoods computed longhand, and files that are refused."""

from __future__ import annotations

import json

import pytest
import torch

from clframe.cli import main
from clframe.data.choices import Choices, read_questions, right_choices
from clframe.errors import ConfigError, DataError
from clframe.sparsity.scores import choice_note
from clframe.sparsity.study import study_sparsity
from clframe.targets import open_target

QUESTIONS = (
    {"question": "pay my", "choices": ["bill", "alarm now please", "rent"], "answer": 0},
    {"context": "where is", "choices": ["my card", "the rent now"], "answer": 1, "subject": "ignored"},
    {"question": "wake me up", "choices": ["now", "please pay my bill", "card", "rent"], "answer": 3},
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("\n\n".join(map(json.dumps, QUESTIONS)) + "\n")
    return path


def longhand(model, tokenizer, *, normalized):
    right = []
    for one in QUESTIONS:
        question, scores = one.get("question", one.get("context")), []
        for choice in one["choices"]:
            start = [tokenizer.cls_token_id, *tokenizer(question, add_special_tokens=False)["input_ids"]]
            ids = [*start, *tokenizer(choice, add_special_tokens=False)["input_ids"]]
            with torch.no_grad():
                log_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            total = sum(float(log_TV[at - 1, ids[at]]) for at in range(len(start), len(ids)))
            scores.append(total / len(choice) if normalized else total)
        right.append(max(range(len(scores)), key=scores.__getitem__) == one["answer"])
    return sum(right) / len(right)


@pytest.mark.parametrize("name", ["choices", "choices_normalized"])
def test_accuracy_by_likelihood(llama, file, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = open_target(str(llama), data=str(file))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    # A model that prefers the first word of the right choices, so that the score is not 0.
    with torch.no_grad():
        for one in (target.model, model):
            one.lm_head.weight[tokenizer.convert_tokens_to_ids("rent")] += 0.4
            one.lm_head.weight[tokenizer.convert_tokens_to_ids("bill")] -= 0.2
    study = study_sparsity(target, score=name, roles=["intermediate"], rules=["top_k"])
    expected = longhand(model, tokenizer, normalized=name == "choices_normalized")
    assert study.report.dense == pytest.approx(expected) and 0 < expected < 1 and study.samples == 3
    assert study.report.curves[0].scores[0] == pytest.approx(expected)
    assert "of 3 questions right, not clearly above the 36.1 % of guessing (clear is more than 81.7 %, one-sided at 95 %)" in study.language.note
    assert study_sparsity(target, score=name, roles=["up"], size=1).report.dense == pytest.approx(expected)


def test_ties_are_not_right_and_guessing_is_noted():
    two = Choices((2, 3), (0, 2), torch.tensor([1.0, 2, 1, 1, 4]))
    values = torch.tensor([-1.0, -1.0, -3.0, -2.0, -4.0])
    assert right_choices(values, two, normalized=False).tolist() == [0, 0]
    assert right_choices(values, two, normalized=True).tolist() == [0, 1]
    assert choice_note(0.30, [4] * 1000) == "" and "not clearly above the 25.0 % of guessing (clear is more than 27.3 %, " in choice_note(0.27, [4] * 1000)


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"question": "a"}', 'line 1 of .* is not {"question": "...", "choices"'),
        ("[1]", "line 1 of .* is not"),
        ("{", "line 1 of .* is not"),
        ('{"question": "a", "choices": ["b", 3], "answer": 0}', "line 1 of .* is not"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "has 1 choices and answer 0; give at least 2"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "has 2 choices and answer 2"),
        ('{"question": "a", "choices": ["b", "c"], "answer": true}', "has 2 choices and answer True"),
        ("", "contains no question"),
    ],
)
def test_files_that_are_refused(tmp_path, line, said):
    path = tmp_path / "q.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=said) as caught:
        read_questions(path)
    assert "\n" not in str(caught.value)


def test_options_that_do_not_fit(llama, file, lines_of_text, capsys, tmp_path):
    with pytest.raises(DataError, match="no file .*gone"):
        open_target(str(llama), data=str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match="--length: question 1 has 6 tokens with a choice, more than 4; give --length 6"):
        open_target(str(llama), data=str(file), max_length=4)
    with pytest.raises(ConfigError, match="--generate: found 2 for questions"):
        open_target(str(llama), data=str(file), generate=2)
    with pytest.raises(ConfigError, match="found questions .*, which a model cannot be converted on"):
        open_target(str(llama), data=str(file), divide=True)
    code = main(["analyze", "sparsity", str(llama), "--data", str(lines_of_text), "--score", "choices", "--output", str(tmp_path / "o")])
    assert code == 2 and "--score: found choices, but --data has no questions" in capsys.readouterr().err


@pytest.fixture
def lines_of_text(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("pay my bill\n")
    return path
