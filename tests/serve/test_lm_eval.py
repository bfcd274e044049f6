"""EleutherAI's evaluation harness, unchanged, against the HTTP door. (Node's client is in `tests/examples`.)"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers.fake_backend import FakeBackend, make_engine
from helpers.servers import serving_http

ROOT = Path(__file__).parents[2]
HARNESS = Path(os.environ.get("MOTET_HOME", ROOT / ".motet")) / "lm-eval" / "venv" / "bin" / "lm-eval"

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
doc_to_choice: {choices}
metric_list: [{{metric: {metric}}}]
"""


@pytest.mark.slow
@pytest.mark.skipif(not HARNESS.is_file(), reason="`make lm-eval` installs the evaluation harness, and runs this test")
def test_the_evaluation_harness_runs_two_tasks(tokenizer, tmp_path):
    """One task scores choices by log-likelihood (echo), the other generates."""
    rows = [{"text": f"question {i}", "target": i % 2} for i in range(6)]
    for name, kind, metric, choices in (
        ("choose", "multiple_choice", "acc", '["yes", "no"]'),
        ("write", "generate_until", "exact_match", "null"),
    ):
        data = tmp_path / f"{name}.jsonl"
        data.write_text(
            "\n".join(json.dumps(row | {"target": row["target"] if kind == "multiple_choice" else "x"}) for row in rows)
        )
        text = TASK.format(name=name, data=data, kind=kind, metric=metric, choices=choices)
        if kind == "generate_until":
            text = text.replace(
                "doc_to_choice: null\n", "generation_kwargs: {until: ['\\n'], max_gen_toks: 8, do_sample: false}\n"
            )
        (tmp_path / f"{name}.yaml").write_text(text)
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_text(content)
    with make_engine(tokenizer, FakeBackend(vocab_size=259)) as engine, serving_http(engine) as (address, _service):
        model = f"model=fake,base_url=http://{address}/v1/completions,tokenizer_backend=huggingface,tokenizer={tmp_path},num_concurrent=2,max_length=90,max_retries=1"
        command = [
            str(HARNESS),
            "run",
            "--model",
            "local-completions",
            "--model_args",
            model,
            "--include_path",
            str(tmp_path),
        ]
        command += ["--tasks", "choose,write", "--output_path", str(tmp_path / "out"), "--batch_size", "1"]
        variables = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=variables)
        assert done.returncode == 0, done.stderr[-3000:]
    [file] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert set(results) == {"choose", "write"}
    assert 0 <= results["choose"]["acc,none"] <= 1
