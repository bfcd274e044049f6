"""llama.cpp in a process of an environment of its own (`make llama-cpp`), as the reference of GGUF files.

Run as a program by that environment's interpreter, it answers a line of JSON for each line of JSON, and imports nothing of
Motet.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

F32 = 0  # of ggml_type, and of llama_ftype: all tensors
CONTEXT = 512


class LlamaCpp:
    """The process. Its methods raise `RuntimeError` with llama.cpp's words."""

    def __init__(self, python: Path, log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def logits(self, gguf: Path, token_ids: list[int]):
        """[tokens, vocab] f32 of one sequence from position 0, computed with keys and values in F32."""
        import numpy as np

        out = self._log.with_suffix(".npy")
        self._ask({"do": "logits", "gguf": str(gguf), "token_ids": token_ids, "out": str(out)})
        return np.load(out)

    def tokenize(self, gguf: Path, texts: list[str], begins: bool = False) -> list[list[int]]:
        """Token ids of each text, special tokens in it included. `begins`: with what the file adds to each text."""
        return self._ask({"do": "tokenize", "gguf": str(gguf), "texts": texts, "begins": begins})["ids"]

    def quantize(self, source: Path, out: Path, ftype: int) -> None:
        """Write `source` in a mixture of types, a number of llama_ftype."""
        self._ask({"do": "quantize", "gguf": str(source), "out": str(out), "ftype": ftype})

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
            raise RuntimeError(f"llama.cpp: {answer.get('error', 'the process ended')}\n{words}")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def _load(api, gguf: str, **options):
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    for name, value in options.items():
        setattr(params, name, value)
    model = api.llama_model_load_from_file(gguf.encode(), params)
    if not model:
        raise RuntimeError(f"cannot load {gguf}")
    return model


def _logits(api, message: dict) -> dict:
    import numpy as np

    ids = message["token_ids"]
    model = _load(api, message["gguf"], use_extra_bufts=False)
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
    params.n_threads = params.n_threads_batch = 2
    params.type_k = params.type_v = F32
    params.flash_attn_type = 0  # off
    params.swa_full = True
    context = api.llama_init_from_model(model, params)
    batch = api.llama_batch_init(CONTEXT, 0, 1)
    for index, token in enumerate(ids):
        batch.token[index], batch.pos[index] = token, index
        batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, True
    batch.n_tokens = len(ids)
    if api.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")
    width = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (width,)).copy() for i in range(len(ids))]
    np.save(message["out"], np.stack(rows))
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
    return {"done": True}


def _tokenize(api, message: dict) -> dict:
    model = _load(api, message["gguf"], vocab_only=True)
    vocab, found = api.llama_model_get_vocab(model), []
    for text in message["texts"]:
        data = text.encode()
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = api.llama_tokenize(vocab, data, len(data), ids, room, message["begins"], True)
        if count < 0:
            raise RuntimeError("llama_tokenize failed")
        found.append(list(ids[:count]))
    api.llama_model_free(model)
    return {"ids": found}


def _quantize(api, message: dict) -> dict:
    params = api.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = message["ftype"], True, 2
    if api.llama_model_quantize(message["gguf"].encode(), message["out"].encode(), params):
        raise RuntimeError("llama_model_quantize failed")
    return {"done": True}


def main() -> None:
    import llama_cpp as api

    # what llama.cpp prints must not come between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    api.llama_backend_init()
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = {"logits": _logits, "tokenize": _tokenize, "quantize": _quantize}[message["do"]](api, message)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
