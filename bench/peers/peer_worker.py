"""One runtime in a process of its own, driven by JSON lines on stdin and stdout. Imports nothing of Motet but for the
runtime `motet` itself, so that it also runs under an interpreter that has only the peers.

First line in: {"runtime", "variant", "threads", "lengths": {sequences: tokens at most}, "paths": {…}}; out: {"version"} or
{"error"}. Then calls, each of which generates greedily for all its prompts at once:

    in   {"prompts": [[token id, …], …], "steps", "chunks"}
    out  {"seconds"}            until every sequence has its first token
    in   {"go"}                 } `chunks` times: one step that is not measured (others ran meanwhile, and took the
    out  {"seconds", "tokens", "cpu_seconds"}   } caches), then `steps` measured ones, within one and the same generation
    out  {"sequence": [token id, …]}            the first tokens of the first sequence, when all has ended

With "score" in the first line: {"token_ids", "out"} in, {"scored"} out, logits [tokens, vocab] in the .npy file `out`.

A generation waits between its chunks for the line that lets it go on, so that runtimes can take turns without computing
their prompts again. That is `Pacer`'s doing: every runtime tells it of each token as it comes.
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

Answer = Callable[[dict[str, Any]], None]
Generate = Callable[[list[list[int]], "Pacer"], list[int]]
Score = Callable[[list[int]], Any]
LLAMA_BATCH = 512
UNMEASURED = 1  # steps at the start of a chunk


class Pacer:
    """Takes the times of a generation of `sequences`, and holds it up between chunks.

    The sequence that started last sets the pace: once it has its first token all others run, and they go on running
    until it has `last_token`. Others are ahead of it, so they ask for `new_tokens`, which is more.
    """

    def __init__(self, sequences: int, steps: int, chunks: int, answer: Answer, wait: Callable[[], object]) -> None:
        self.last_token = 1 + chunks * (UNMEASURED + steps)
        self.new_tokens = self.last_token + (2 * sequences if chunks and sequences > 1 else 0)
        self._counts = [0] * sequences
        self._missing = set(range(sequences))
        self._pace = 0
        self._steps = steps
        self._answer = answer
        self._wait = wait
        self._noted = 0
        self._start = time.perf_counter()
        self._cpu_start = time.process_time()

    @property
    def sequences(self) -> int:
        return len(self._counts)

    def step(self) -> None:
        """Every sequence has one token more."""
        for sequence in range(self.sequences):
            self.note(sequence)

    def note(self, sequence: int) -> None:
        """A token of a sequence has come."""
        self._counts[sequence] += 1
        self._noted += 1
        if self._missing:
            self._missing.discard(sequence)
            if not self._missing:
                self._pace = sequence
                self._counts[sequence] = 1
                self._answer({"seconds": time.perf_counter() - self._start})
                self._hold()
        elif sequence == self._pace and self._counts[sequence] <= self.last_token:
            self._advance((self._counts[sequence] - 1) % (UNMEASURED + self._steps))

    def _advance(self, place: int) -> None:
        if place == UNMEASURED:
            self._noted = 0
            self._start, self._cpu_start = time.perf_counter(), time.process_time()
        elif place == 0:
            seconds, cpu = time.perf_counter() - self._start, time.process_time() - self._cpu_start
            self._answer({"seconds": seconds, "tokens": self._noted, "cpu_seconds": cpu})
            self._hold()

    def _hold(self) -> None:
        if self._counts[self._pace] < self.last_token:
            self._wait()


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
        prefix_cache=False,  # a repetition may have the same prompts, and is to compute them
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

    # Unless told, it takes half of the machine's CPUs.
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


def gguf(job: dict[str, Any]) -> str:
    """The GGUF file of a variant. Q8_0 is made of the pulled file where it is missing; that needs llama-cpp-python."""
    source = Path(job["paths"]["gguf"])
    if job["variant"] not in ("Q8_0", "int8"):
        return str(source)
    target = Path(job["paths"]["scratch"]) / f"{source.stem}-to-q8_0.gguf"
    if not target.is_file():
        import llama_cpp as api

        params = api.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = api.LLAMA_FTYPE_MOSTLY_Q8_0, True
        work = target.with_suffix(f".{os.getpid()}")
        if api.llama_model_quantize(str(source).encode(), str(work).encode(), params):
            raise RuntimeError(f"llama.cpp cannot quantise {source.name} to Q8_0")
        work.replace(target)
    return str(target)


class LlamaCpp:
    """llama.cpp through its C interface, with a context for each number of sequences."""

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
        """Logits [tokens, vocab]."""
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
        """One call for rows of (token, position, sequence, whether its logits are wanted)."""
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

    out = Path(job["paths"]["scratch"]) / "ctranslate2-int8"
    if not (out / "model.bin").is_file():
        converter = ctranslate2.converters.TransformersConverter(job["paths"]["model"], low_cpu_mem_usage=False)
        converter.convert(str(out), quantization="int8", force=True)
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


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # what a runtime prints itself must not mix with the answers
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    job = json.loads(sys.stdin.readline())
    os.environ["OMP_NUM_THREADS"] = str(job["threads"])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])  # nobody takes more than it was given
    try:
        serve = _scorer(job, answer) if job.get("score") else _generator(job, answer)
    except ModuleNotFoundError as error:
        answer({"error": f"not installed ({error.name})"})
        return
    except Exception as error:  # a peer that does not start is reported, the others go on
        answer({"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
        return
    for line in iter(sys.stdin.readline, ""):
        try:
            serve(json.loads(line))
        except Exception as error:  # as above
            answer({"error": f"{type(error).__name__}: {error}"})


def _generator(job: dict[str, Any], answer: Answer) -> Callable[[dict[str, Any]], None]:
    version, generate = RUNTIMES[job["runtime"]](job)
    answer({"version": version})

    def serve(call: dict[str, Any]) -> None:
        pacer = Pacer(len(call["prompts"]), call["steps"], call["chunks"], answer, sys.stdin.readline)
        tokens = generate(call["prompts"], pacer)[: pacer.last_token]
        answer({"sequence": [int(token) for token in tokens]})

    return serve


def _scorer(job: dict[str, Any], answer: Answer) -> Callable[[dict[str, Any]], None]:
    import numpy as np

    version, score = SCORERS[job["runtime"]](job)
    answer({"version": version})

    def serve(call: dict[str, Any]) -> None:
        np.save(call["out"], score(call["token_ids"]))
        answer({"scored": len(call["token_ids"])})

    return serve


if __name__ == "__main__":
    main()
