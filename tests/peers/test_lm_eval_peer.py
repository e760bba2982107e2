"""The real lm-evaluation-harness measures a model through the server, and finds what we compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from megalite.data.tokenizer import Tokenizer
from megalite.generate.cache import Part, Step
from megalite.generate.load import Place, load_share, open_checkpoint
from tests.ranks.serving import Client

pytestmark = pytest.mark.peers

QUESTIONS = [
    {"question": "def add(a, b):", "choices": [" return a + b", " return a"], "answer": 0},
    {"question": "import", "choices": [" os", " sys as system", " re"], "answer": 2},
    {"question": "class A:", "choices": [" pass", " x = 1"], "answer": 1},
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_likelihoods_over_http_are_the_models_own(
    server: Client, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "t" * 40)
    import lm_eval
    from lm_eval.tasks import TaskManager

    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(file=file))
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(run / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    theirs.save_pretrained(tmp_path / "tokenizer")
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny",
            "base_url": f"http://127.0.0.1:{server.port}/v1/completions",
            "tokenizer": str(tmp_path / "tokenizer"),
            "tokenizer_backend": "huggingface",
            "max_retries": 1,
            "max_length": 96,
        },
        tasks=["tiny_choice"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    place = Place(slots=1, dtype=torch.float32, device=torch.device("cpu"))
    share = load_share(open_checkpoint(run), place)
    right = 0
    for sample in found["samples"]["tiny_choice"]:
        doc, ours = sample["doc"], []
        for choice in doc["choices"]:
            before = len(tokenizer.encode(doc["question"]))
            ids = tokenizer.encode(doc["question"] + choice)
            logits = share.run(Step((Part(0, 0, tuple(ids), len(ids)),))).double()
            logs = torch.log_softmax(logits, -1)
            ours.append(sum(logs[i - 1, ids[i]].item() for i in range(before, len(ids))))
        over_http = [float(answer[0][0]) for answer in sample["resps"]]
        assert over_http == pytest.approx(ours, abs=1e-4)
        right += ours.index(max(ours)) == doc["answer"]
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
