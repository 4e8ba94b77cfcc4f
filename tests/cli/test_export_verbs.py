"""``clframe export`` and ``clframe card`` on the command line."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export",), "export: found nothing; give one run folder"),
        (("export", "one", "two"), "export: found one two; give one run folder"),
        (("export", "nowhere", "--format", "pt2"), "export: no folder nowhere"),
        (("export", "nowhere", "--format", "tflite"), "unknown format 'tflite'"),
        (("export", "nowhere", "--format", "pt2", "--opset", "18"), "--opset found for --format pt2"),
        (("export", "nowhere", "--opset", "new"), "--opset found 'new'; give a whole number"),
        (("export", "nowhere", "--threshold", "high"), "--threshold found 'high'"),
        (("card",), "card: found nothing; give one run folder"),
        (("card", "nowhere"), "card: no folder nowhere"),
        (("card", "nowhere", "--public"), "--public has an effect with --push-to-hub only"),
        (("card", "nowhere", "--push-to-hub", "name"), "--push-to-hub found 'name'; give USER/NAME"),
        (("card", "nowhere", "--license", "All rights"), "--license found 'All rights'"),
    ],
)
def test_bad_input_is_one_line(refused, arguments, message):
    refused(arguments, message)


def test_export_and_card_print_what_they_wrote(call, here, finished, monkeypatch):
    pytest.importorskip("safetensors")
    run, uploads = str(finished[0]), []

    class Client:
        def create_repo(self, repo, **options):
            return f"https://hub.example/{repo}"

        def upload_folder(self, **options):
            uploads.append(options["folder_path"])

    monkeypatch.setattr("clframe.targets.card.hub_client", Client)
    code, out, err = call("export", run, "--format", "pt2", "--output", "graph")
    assert (code, err) == (0, "")
    assert [line.split("  ")[0] for line in out.splitlines()] == ["graph/model.json", "graph/model.pt2"]
    code, out, err = call("card", run, "--output", "card", "--license", "mit", "--push-to-hub", "me/digits")
    assert (code, err) == (0, "")
    assert uploads == ["card"] and out.splitlines()[-1] == "https://hub.example/me/digits"
    code, _, err = call("card", run, "--output", "card")
    assert code == 2 and err == "clframe: error: card: card exists; give another --output, or delete it\n"
