"""One runtime in a process of its own, driven by JSON lines on stdin and stdout. Imports nothing of Motet but for the
runtime `motet` itself, so that it also runs under an interpreter that has only the peers.

First line in: {"runtime", "threads", "max_tokens", "max_sequences", "paths": {…}}; out: {"version"} or {"error"}.
Then each line in: {"prompts": [[token id, …], …], "new_tokens"}; out: {"seconds", "tokens"}: the time to generate exactly
`new_tokens` greedily for all prompts at once, and what the first sequence got.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], list[int]]


def load_motet(job: dict[str, Any]) -> tuple[str, Generate]:
    from motet.runtime.config import EngineConfig
    from motet.runtime.engine import Engine
    from motet.runtime.request import Ensemble, Member, Request, SamplingParams

    config = EngineConfig(
        threads=job["threads"],
        max_num_seqs=job["max_sequences"],
        max_model_len=job["max_tokens"],
        prefill_chunk=512,
        prefix_cache=False,  # a repetition has the same prompts, and is to compute them
    )
    engine = Engine.from_bundle(job["paths"]["bundle"], config)
    ensemble = Ensemble((Member(engine.model.members[0], 1.0),))

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        requests = [Request(str(i), (tuple(prompt),), ensemble, params) for i, prompt in enumerate(prompts)]
        return list(engine.complete(requests)[0][0].token_ids)

    return importlib.metadata.version("motet"), generate


def load_onnxruntime_genai(job: dict[str, Any]) -> tuple[str, Generate]:
    import numpy as np
    import onnxruntime_genai as genai

    # Unless told, it takes half of the machine's CPUs.
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": job["threads"]}}}}
    config = genai.Config(job["paths"]["genai"])
    config.overlay(json.dumps(options))
    model = genai.Model(config)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        params = genai.GeneratorParams(model)
        length = len(prompts[0]) + new_tokens
        params.set_search_options(
            batch_size=len(prompts),
            max_length=length,
            min_length=length,
            do_sample=False,
            past_present_share_buffer=True,
        )
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(prompts[0]) :]]

    return importlib.metadata.version("onnxruntime-genai"), generate


def load_llama_cpp(job: dict[str, Any]) -> tuple[str, Generate]:
    import llama_cpp as api
    import numpy as np

    api.llama_backend_init()
    model = api.llama_model_load_from_file(job["paths"]["gguf"].encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx = job["max_tokens"] * job["max_sequences"]
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = job["max_sequences"]
    params.n_threads = params.n_threads_batch = job["threads"]
    context = api.llama_init_from_model(model, params)
    vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(512, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, sequence, wanted
        batch.n_tokens = len(rows)
        if api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def best(index: int) -> int:
        return int(np.argmax(np.ctypeslib.as_array(api.llama_get_logits_ith(context, index), (vocab_size,))))

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        tokens, first = [], []
        for sequence, prompt in enumerate(prompts):
            for start in range(0, len(prompt), 512):
                part = prompt[start : start + 512]
                last = start + len(part) == len(prompt)
                decode([(t, start + i, sequence, last and i == len(part) - 1) for i, t in enumerate(part)])
            tokens.append(best(len(part) - 1))
        for step in range(new_tokens):
            first.append(tokens[0])
            if step + 1 < new_tokens:
                decode([(token, len(prompts[s]) + step, s, True) for s, token in enumerate(tokens)])
                tokens = [best(s) for s in range(len(prompts))]
        return first

    return importlib.metadata.version("llama-cpp-python"), generate


def load_ctranslate2(job: dict[str, Any]) -> tuple[str, Generate]:
    import ctranslate2
    import transformers

    out = Path(job["paths"]["scratch"]) / "ctranslate2-int8"
    if not (out / "model.bin").is_file():
        converter = ctranslate2.converters.TransformersConverter(job["paths"]["model"], low_cpu_mem_usage=False)
        converter.convert(str(out), quantization="int8", force=True)
    generator = ctranslate2.Generator(str(out), device="cpu", compute_type="int8", intra_threads=job["threads"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["paths"]["model"])

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        results = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return list(results[0].sequences_ids[0])

    return importlib.metadata.version("ctranslate2"), generate


def load_openvino_genai(job: dict[str, Any]) -> tuple[str, Generate]:
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = job["max_sequences"]
    scheduler.cache_size = 2
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        job["paths"]["gguf"], scheduler, "CPU", {"INFERENCE_NUM_THREADS": job["threads"]}, {}
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.do_sample = False
        config.ignore_eos = True
        inputs = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        results = pipeline.generate(inputs, [config] * len(prompts))
        return list(results[0].m_generation_ids[0])

    return importlib.metadata.version("openvino-genai"), generate


def load_transformers(job: dict[str, Any]) -> tuple[str, Generate]:
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["paths"]["model"], torch_dtype=torch.bfloat16)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        ids = torch.tensor(prompts)
        with torch.no_grad():
            result = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return list(result[0, len(prompts[0]) :].tolist())

    return importlib.metadata.version("transformers"), generate


RUNTIMES: dict[str, Callable[[dict[str, Any]], tuple[str, Generate]]] = {
    "motet": load_motet,
    "onnxruntime-genai": load_onnxruntime_genai,
    "llama.cpp": load_llama_cpp,
    "CTranslate2": load_ctranslate2,
    "OpenVINO GenAI": load_openvino_genai,
    "transformers": load_transformers,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # what a runtime prints itself must not mix with the answers
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    job = json.loads(sys.stdin.readline())
    os.environ["OMP_NUM_THREADS"] = str(job["threads"])
    try:
        version, generate = RUNTIMES[job["runtime"]](job)
    except ModuleNotFoundError as error:
        answer({"error": f"not installed ({error.name})"})
        return
    except Exception as error:  # a peer that does not start is reported, the others go on
        answer({"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
        return
    answer({"version": version})
    for line in sys.stdin:
        call = json.loads(line)
        try:
            start = time.perf_counter()
            tokens = generate(call["prompts"], call["new_tokens"])
            answer({"seconds": time.perf_counter() - start, "tokens": [int(token) for token in tokens]})
        except Exception as error:  # as above
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
