"""The runtimes that `peer_worker.py` can run. Each function loads one and returns (version, how to generate or score).

A job has "variant", "threads", "lengths" and "paths", as the first line of `peer_worker.py`. Nothing is imported before
it is needed: an interpreter has only some of the runtimes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

LLAMA_BATCH = 512  # rows in one call of llama_decode


class Pacer(Protocol):
    """Told of each token as it comes: see `peer_worker.Pacer`."""

    @property
    def last_token(self) -> int:
        """Tokens that the sequence that starts last must have."""

    @property
    def new_tokens(self) -> int:
        """Tokens to generate where sequences start one after the other."""

    def note(self, sequence: int) -> None:
        """Note one more token of a sequence. May wait."""

    def step(self) -> None:
        """Note one more token of every sequence. May wait."""


Generate = Callable[[list[list[int]], Pacer], list[int]]  # (prompts, pacer) → tokens of the first sequence
Score = Callable[[list[int]], Any]  # token ids → logits [tokens, vocab]


def load_motet(job: dict[str, Any]) -> tuple[str, Generate]:
    from motet.runtime.api.config import EngineConfig
    from motet.runtime.api.output import Output
    from motet.runtime.api.request import Ensemble, Member, Request
    from motet.runtime.api.sampling import SamplingParams
    from motet.runtime.engine.engine import Engine

    config = EngineConfig(
        threads=job["threads"],
        max_num_seqs=max(map(int, job["lengths"])),
        max_model_len=max(job["lengths"].values()),
        prefill_chunk=512,
        prefix_cache=False,  # repeated prompts must be computed again
    )
    engine = Engine.from_bundle(job["paths"]["bundle"], config)
    ensemble = Ensemble((Member(engine.model.members[0], 1.0),))

    def generate(prompts: list[list[int]], pacer: Pacer) -> list[int]:
        params = SamplingParams(max_tokens=pacer.new_tokens, temperature=0.0, ignore_eos=True)
        requests = [Request(str(i), (tuple(prompt),), ensemble, params) for i, prompt in enumerate(prompts)]

        def note(delta: Output) -> None:
            for _ in delta.token_ids:
                pacer.note(int(delta.request_id))

        return list(engine.complete(requests, note)[0][0].token_ids)

    return importlib.metadata.version("motet"), generate


def load_onnxruntime_genai(job: dict[str, Any]) -> tuple[str, Generate]:
    import numpy as np
    import onnxruntime_genai as genai

    # Its default is half of the machine's CPUs.
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": job["threads"]}}}}
    config = genai.Config(job["paths"][f"genai-{job['variant']}"])
    config.overlay(json.dumps(options))
    model = genai.Model(config)

    def generate(prompts: list[list[int]], pacer: Pacer) -> list[int]:
        params = genai.GeneratorParams(model)
        length = len(prompts[0]) + pacer.last_token
        params.set_search_options(
            batch_size=len(prompts),
            max_length=length,
            min_length=length,
            do_sample=False,
            past_present_share_buffer=True,
        )
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(pacer.last_token):
            generator.generate_next_token()
            pacer.step()
        return [int(token) for token in generator.get_sequence(0)[len(prompts[0]) :]]

    return importlib.metadata.version("onnxruntime-genai"), generate


MADE = {"Q8_0": "Q8_0", "int8": "Q8_0", "Q4_K_M": "Q4_K_M"}  # variant → the type that llama.cpp quantises to


def gguf(job: dict[str, Any]) -> str:
    """The GGUF file of a variant. One that is missing is made from the file that is there, which needs llama-cpp-python."""
    source, kind = Path(job["paths"]["gguf"]), MADE.get(job["variant"])
    if kind is None:
        return str(source)
    target = Path(job["paths"]["scratch"]) / f"{source.stem}-to-{kind.lower()}.gguf"
    if not target.is_file():
        import llama_cpp as api

        params = api.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
        work = target.with_suffix(f".{os.getpid()}")
        if api.llama_model_quantize(str(source).encode(), str(work).encode(), params):
            raise RuntimeError(f"llama.cpp cannot quantise {source.name} to {kind}")
        work.replace(target)
    return str(target)


class LlamaCpp:
    """llama.cpp through its C interface, with one context for each number of sequences."""

    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp as api

        self._api = api
        api.llama_backend_init()
        model = api.llama_model_load_from_file(gguf(job).encode(), api.llama_model_default_params())
        if not model:
            raise RuntimeError("llama.cpp cannot load the GGUF file")
        self._contexts = {}
        for sequences, length in job["lengths"].items():
            params = api.llama_context_default_params()
            params.n_ctx = length * int(sequences)
            params.n_batch = params.n_ubatch = LLAMA_BATCH
            params.n_seq_max = int(sequences)
            params.n_threads = params.n_threads_batch = job["threads"]
            self._contexts[int(sequences)] = api.llama_init_from_model(model, params)
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(LLAMA_BATCH, 0, 1)

    def generate(self, prompts: list[list[int]], pacer: Pacer) -> list[int]:
        context = self._empty(len(prompts))
        tokens = []
        for sequence, prompt in enumerate(prompts):
            for start in range(0, len(prompt), LLAMA_BATCH):
                part = prompt[start : start + LLAMA_BATCH]
                last = len(prompt) - start - 1
                self._decode(context, [(t, start + i, sequence, i == last) for i, t in enumerate(part)])
            tokens.append(self._best(context, len(part) - 1))
        pacer.step()
        first = [tokens[0]]
        for step in range(pacer.last_token - 1):
            self._decode(context, [(token, len(prompts[s]) + step, s, True) for s, token in enumerate(tokens)])
            tokens = [self._best(context, s) for s in range(len(prompts))]
            first.append(tokens[0])
            pacer.step()
        return first

    def score(self, token_ids: list[int]) -> Any:
        """Logits [tokens, vocab] of one sequence."""
        import numpy as np

        context = self._empty(1)
        rows = []
        for start in range(0, len(token_ids), LLAMA_BATCH):
            part = token_ids[start : start + LLAMA_BATCH]
            self._decode(context, [(token, start + i, 0, True) for i, token in enumerate(part)])
            rows += [self._logits(context, index).copy() for index in range(len(part))]
        return np.stack(rows)

    def _empty(self, sequences: int) -> Any:
        context = self._contexts[sequences]
        self._api.llama_memory_clear(self._api.llama_get_memory(context), True)
        return context

    def _decode(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        """One call of llama_decode. A row is (token, position, sequence, whether its logits are needed)."""
        batch = self._batch
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, sequence, wanted
        batch.n_tokens = len(rows)
        if self._api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def _logits(self, context: Any, index: int) -> Any:
        import numpy as np

        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(context, index), (self._vocab_size,))

    def _best(self, context: Any, index: int) -> int:
        return int(self._logits(context, index).argmax())


def load_llama_cpp(job: dict[str, Any]) -> tuple[str, Generate]:
    return importlib.metadata.version("llama-cpp-python"), LlamaCpp(job).generate


def load_llama_cpp_scorer(job: dict[str, Any]) -> tuple[str, Score]:
    return importlib.metadata.version("llama-cpp-python"), LlamaCpp(job).score


def load_ctranslate2(job: dict[str, Any]) -> tuple[str, Generate]:
    import ctranslate2
    import transformers

    out = Path(job["paths"]["ctranslate2"])
    if not out.is_dir():
        converter = ctranslate2.converters.TransformersConverter(job["paths"]["model"], low_cpu_mem_usage=False)
        work = out.with_suffix(f".{os.getpid()}")
        converter.convert(str(work), quantization="int8", force=True)
        work.replace(out)
    generator = ctranslate2.Generator(str(out), device="cpu", compute_type="int8", intra_threads=job["threads"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["paths"]["model"])

    def generate(prompts: list[list[int]], pacer: Pacer) -> list[int]:
        def note(result: Any) -> bool:
            pacer.note(result.batch_id)
            return False  # go on

        results = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts],
            max_length=pacer.last_token,
            min_length=pacer.last_token,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=note,
        )
        return list(results[0].sequences_ids[0])

    return importlib.metadata.version("ctranslate2"), generate


def load_openvino_genai(job: dict[str, Any]) -> tuple[str, Generate]:
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = max(map(int, job["lengths"]))
    scheduler.cache_size = 2
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        gguf(job), scheduler, "CPU", {"INFERENCE_NUM_THREADS": job["threads"]}, {}
    )

    def generate(prompts: list[list[int]], pacer: Pacer) -> list[int]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = pacer.new_tokens
        config.do_sample = False
        config.ignore_eos = True
        handles = [
            pipeline.add_request(index, openvino.Tensor(np.array([prompt], np.int64)), config)
            for index, prompt in enumerate(prompts)
        ]
        first: list[int] = []
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for sequence, handle in enumerate(handles):
                while handle.can_read():
                    (output,) = handle.read().values()
                    first += output.generated_ids if sequence == 0 else ()
                    for _ in output.generated_ids:
                        pacer.note(sequence)
        return first

    return importlib.metadata.version("openvino-genai"), generate


def load_transformers(job: dict[str, Any]) -> tuple[str, Generate]:
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["paths"]["model"], torch_dtype=torch.bfloat16)

    def generate(prompts: list[list[int]], pacer: Pacer) -> list[int]:
        ids = torch.tensor(prompts)

        class Note(transformers.StoppingCriteria):  # type: ignore[misc]
            def __call__(self, _ids: Any, _scores: Any, **_kwargs: Any) -> Any:
                pacer.step()
                return torch.zeros(len(prompts), dtype=torch.bool)

        with torch.no_grad():
            result = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=pacer.last_token,
                min_new_tokens=pacer.last_token,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[Note()],
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
SCORERS: dict[str, Callable[[dict[str, Any]], tuple[str, Score]]] = {"llama.cpp": load_llama_cpp_scorer}
