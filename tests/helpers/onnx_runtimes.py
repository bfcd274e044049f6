"""Optimum and OpenVINO in a process of an environment of their own (`make onnx-runtimes`).

Run as a program by that environment's interpreter, it answers a line of JSON for each line of JSON, and imports nothing of
Motet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


class OnnxRuntimes:
    """The process. Its methods raise `RuntimeError` with what went wrong in it."""

    def __init__(self, python: Path, log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def generate(self, directory: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
        """Greedy tokens of Optimum's `ORTModelForCausalLM`, of all prompts in one batch that is padded on the left."""
        return self._ask({"do": "generate", "directory": str(directory), "prompts": prompts, "count": count})["tokens"]

    def logits(self, directory: Path, prompts: list[list[int]], heads: int, head_size: int):
        """Logits [tokens, vocab] f32 of OpenVINO, of each prompt; all of them in one batch that is padded on the left. `heads`:
        of keys and values."""
        import numpy as np

        out = self._log.with_suffix(".npz")
        shape = {"heads": heads, "head_size": head_size, "out": str(out)}
        self._ask({"do": "logits", "directory": str(directory), "prompts": prompts, **shape})
        with np.load(out) as found:
            return [found[f"arr_{index}"] for index in range(len(prompts))]

    def _ask(self, message: dict) -> dict:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline() or "{}")
        except BrokenPipeError:
            answer = {}
        if "error" in answer or not answer:
            words = self._log.read_text(errors="replace")[-1500:]
            raise RuntimeError(f"{answer.get('error', 'the process ended')}\n{words}")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def _padded(prompts: list[list[int]]):
    """ids and mask, [B, longest]."""
    import numpy as np

    width = max(map(len, prompts))
    ids = np.array([[0] * (width - len(prompt)) + prompt for prompt in prompts], np.int64)
    return ids, np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int64)


def _generate(message: dict) -> dict:
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    model = ORTModelForCausalLM.from_pretrained(message["directory"], session_options=options)
    ids, mask = _padded(message["prompts"])
    choice = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    found = model.generate(
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=message["count"], **choice
    )
    return {"tokens": found[:, ids.shape[1] :].tolist()}


def _logits(message: dict) -> dict:
    import numpy as np
    import openvino

    core, ids_and_mask = openvino.Core(), _padded(message["prompts"])
    model = core.read_model(Path(message["directory"]) / "model.onnx")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}  # activations stay float32
    compiled = core.compile_model(model, "CPU", exact | {"INFERENCE_NUM_THREADS": "2"})
    ids, mask = ids_and_mask
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    empty = np.zeros((len(ids), message["heads"], 0, message["head_size"]), np.float32)
    feeds |= {value.any_name: empty for value in model.inputs if value.any_name.startswith("past")}
    found = compiled(feeds)["logits"]
    np.savez(message["out"], *(row[-len(prompt) :] for row, prompt in zip(found, message["prompts"], strict=True)))
    return {"done": True}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # what the libraries print must not come between the answers
    os.dup2(2, 1)
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = {"generate": _generate, "logits": _logits}[message["do"]](message)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
