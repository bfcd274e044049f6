"""GGUF files in llama.cpp beside Motet: logits of every family, weights of every type bit for bit, ids of real vocabularies.

llama.cpp is built by `make llama-cpp`. What it computes otherwise than a model's definition, and is compared with here:

* GELU is read from a table of 16-bit floats, and always of the tanh approximation.
* Activations that meet quantised weights are rounded to 8 bits, those that meet F16 to 16. So its logits of such files are
  compared after it has widened them itself (to F32, which rounds nothing), and only roughly as they are.
* The window of phi3 is not applied: the model here has none.
"""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers.compare import relative_error
from helpers.gguf_files import File, make_model, write_file
from helpers.reference_gguf import F32, LlamaCpp
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.gguf import convert_gguf
from motet.runtime.checkpoints.gguf_tokenizer import _CUTS, write_tokenizer
from motet.runtime.checkpoints.sources import fetch_gguf
from safetensors.numpy import load_file
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
WHOLE = os.environ.get("MOTET_LLAMA_CPP") == "whole"  # minutes: as `make llama-cpp` runs it; else a part
HOME = Path(os.environ.get("MOTET_HOME", ROOT / ".motet")) / "llama-cpp"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.skipif(not (HOME / ".ready").is_file(), reason="`make llama-cpp` builds llama.cpp, and runs this file"),
]
LIMIT = 3e-5  # of the logits, in units of their deviation: both compute in float32
GELU_LIMIT = 5e-3  # with the table's GELU
TEXT = [256, *range(40, 100)]
FAMILIES = (
    *("llama", "llama-untied", "qwen2", "qwen3", "qwen3_moe", "olmo2 untied", "olmoe untied", "granite", "smollm3"),
    *("gpt2", "gemma", "gemma2", "gemma3_text", "phi3 without a window", "phi3-long"),
    *("gpt_neox", "falcon", "falcon of 40B", "falcon 2"),
)
WITH_GELU = ("gpt", "gemma", "falcon")
ROUGH = {
    "F16": 4e-3,
    "BF16": 3e-2,
    **dict.fromkeys(("Q8_0", "Q4_0", "Q4_1", "IQ4_NL"), 7e-2),
}  # root mean square, else:
ROUGH_K, ROUGH_EXPERTS = 0.1, 0.4  # with experts, a row that is rounded may choose others
TYPES = {  # numbers of llama_ftype: mixtures, most of whose tensors have the type of their name
    "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17,
    "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30,
}  # fmt: skip


def keys(**changes):
    return lambda file: file.keys.update({key.replace("__", "."): value for key, value in changes.items()})


VARIANTS = {
    "linear scaling": ("llama", keys(rope__scaling__type="linear", rope__scaling__factor=4.0)),
    "factors of frequencies": (
        "llama",
        lambda file: file.tensors.update({"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}),
    ),
    "gemma2 of 27B": ("gemma2 of 27B", keys()),
    "gemma2 without a pattern": ("gemma2", keys(attention__sliding_window_pattern=None)),
    "gemma2 of other caps": ("gemma2", keys(attn_logit_softcapping=2.0, final_logit_softcapping=11.0)),
    "gemma2 without caps": ("gemma2", keys(attn_logit_softcapping=None, final_logit_softcapping=None)),
    "gemma3 by a period": ("gemma3_text", keys(attention__sliding_window_pattern=2)),
    "gemma3 without a window": ("gemma3_text", keys(attention__sliding_window=None)),
    "gemma3 with a cap": ("gemma3_text", keys(final_logit_softcapping=7.0)),
    "gemma3 without a local base": ("gemma3_text", keys(rope__freq_base_swa=None)),
    "gptneox, one after the other": ("gpt_neox", keys(use_parallel_residual=False)),
    "falcon without a base": ("falcon", keys(rope__freq_base=None)),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    process = LlamaCpp(HOME / "venv" / "bin" / "python", tmp_path_factory.mktemp("llama") / "log")
    yield process
    process.close()


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def as_a_table(monkeypatch):
    """GELU as llama.cpp has it: the tanh approximation of 16-bit floats."""
    exact = torch.nn.functional.gelu

    def gelu(x, approximate="none"):
        found = exact(x.half().float(), approximate="tanh").half().to(x.dtype)
        return torch.where(x <= -10, 0, torch.where(x >= 10, x, found))

    return lambda: monkeypatch.setattr(torch.nn.functional, "gelu", gelu)


def page_of(path, out, text=TEXT):
    """Logits [tokens, vocab] of Motet's page, from the file's directory `out`."""
    out.mkdir(exist_ok=True)
    convert_gguf(path, out)
    with torch.no_grad():
        return Decoder.from_dir(out)(torch.tensor([text]))[0]


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS] if WHOLE else FAMILIES[::4])
def test_logits(llama, models_dir, tmp_path, as_a_table, name):
    family, change = VARIANTS.get(name, (name, keys()))
    file = File(make_model(models_dir, family, width=4))
    change(file)
    file.write(tmp_path / "m.gguf")
    expected = torch.from_numpy(llama.logits(tmp_path / "m.gguf", TEXT))
    own = relative_error(page_of(tmp_path / "m.gguf", tmp_path / "m"), expected)
    as_a_table()
    with_table = relative_error(page_of(tmp_path / "m.gguf", tmp_path / "m"), expected)
    print(f"{name}: {own:.1e}, with the table {with_table:.1e}")
    if with_table == own:  # no GELU
        assert own < LIMIT
    else:  # values between two of the table fall to either of them
        assert with_table < own < GELU_LIMIT


@pytest.mark.parametrize("name", FAMILIES if WHOLE else ["falcon"])
def test_types(llama, models_dir, tmp_path, name):
    """Weights are what llama.cpp makes of them, bit for bit, and so are logits but for the order of sums. Roughly, so are those
    that llama.cpp computes with rounded activations."""
    File(make_model(models_dir, name, width=4)).write(tmp_path / "m.gguf")
    found = {}
    for kind, ftype in TYPES.items():
        if kind not in ("Q8_0", "Q4_K_M") and name not in ("llama", "gemma3_text"):
            continue
        llama.quantize(tmp_path / "m.gguf", tmp_path / "small.gguf", ftype)
        assert any(t.tensor_type.name in kind for t in gguf.GGUFReader(tmp_path / "small.gguf").tensors)
        llama.quantize(tmp_path / "small.gguf", tmp_path / "wide.gguf", F32)
        page = page_of(tmp_path / "small.gguf", tmp_path / "small")
        (tmp_path / "wide").mkdir(exist_ok=True)
        convert_gguf(tmp_path / "wide.gguf", tmp_path / "wide")
        small, wide = (load_file(tmp_path / size / "model.safetensors") for size in ("small", "wide"))
        assert small.keys() == wide.keys()
        for tensor, values in small.items():
            assert np.array_equal(values, wide[tensor]), (kind, tensor)
        limit = GELU_LIMIT if name.startswith(WITH_GELU) else LIMIT
        assert relative_error(page, torch.from_numpy(llama.logits(tmp_path / "wide.gguf", TEXT))) < limit, kind
        rough = torch.from_numpy(llama.logits(tmp_path / "small.gguf", TEXT))
        found[kind] = float((rough - page).pow(2).mean().sqrt() / page.std())
    print(name, {kind: f"{error:.1e}" for kind, error in found.items()})
    for kind, error in found.items():
        assert error < (ROUGH_EXPERTS if "moe" in name else ROUGH.get(kind, ROUGH_K)), kind


def test_the_real_model(llama, tmp_path):
    """SmolLM2-135M, as its file is (Q4_1) and widened by llama.cpp."""
    path = fetch_gguf(HOME / "gguf")
    convert_gguf(path, tmp_path)
    text = "The window is thirty positions wide, and each of them is read once.\n\ndef mean(values):\n    return sum(values)"
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert llama.tokenize(path, [text], begins=True) == [ids]
    page = page_of(path, tmp_path, ids)
    llama.quantize(path, tmp_path / "wide.gguf", F32)
    wide, rough = (torch.from_numpy(llama.logits(file, ids)) for file in (tmp_path / "wide.gguf", path))
    found = relative_error(page, wide), relative_error(page, rough)
    chances = [x.double().log_softmax(-1) for x in (page, rough)]
    divergence = float((chances[0].exp() * (chances[0] - chances[1])).sum(-1).mean())
    same = float((page.argmax(-1) == rough.argmax(-1)).float().mean())
    print(
        f"widened {found[0]:.1e}, as it is {found[1]:.1e}, KL {divergence:.1e}, same best token {same:.0%} of {len(ids)}"
    )
    assert found[0] < 1e-4
    assert divergence < 0.02


NAMES = ("gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "starcoder", "refact", "falcon", "gpt-neox")
MORE = [
    "HelloWORLD camelCase XMLHttp I'VE don'T x's'S",
    "ÄÖÜß Straße ÉTÉ été Ωmega ΑΒΓ αβγ ПРИВЕТ Привет",
    "日本語テスト 한국어 العربية हिन्दी ไทย",
    "1234567 12 345 6789012 ½ ² ٣٤٥",
    "a\n\n\nb \n c\t\td   e\r\n\r\nf",
    "//path/to/file ../x http://a.b/c?d=e&f",
    "  lead   trail   ",
    "😀👍🏽 $+<=>^~|` @#%&*()_-[]{}\\;:\"'",
]
PHI_3 = "<|user|>\nHi<|end|>\n\n <|assistant|>\n Yes </s>  a<s>  b<|endoftext|> c <unk> d"


def metadata_of(name):
    metadata = {key: field.contents() for key, field in gguf.GGUFReader(vocabulary(name)).fields.items()}
    return {"tokenizer.ggml.pre": "olmo"} | metadata  # GPT-NeoX's file is older than the key


def vocabulary(name):
    return HOME / "models" / f"ggml-vocab-{name}.gguf"


def known_texts(name):
    return Path(f"{vocabulary(name)}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]


def texts():
    return [
        *known_texts("gpt-2"),
        *MORE,
        *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))),
    ]


def compare_ids(llama, metadata, folder, given=None):
    write_file(folder / "v.gguf", metadata["general.architecture"], metadata)
    write_tokenizer(folder / "v.gguf", metadata, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    given = given or texts()
    for begins in (False, True):
        for text, ids in zip(given, llama.tokenize(folder / "v.gguf", given, begins), strict=True):
            assert tokenizer.encode(text, add_special_tokens=begins).ids == ids, text[:80]


@pytest.mark.parametrize("name", NAMES if WHOLE else ["falcon"])
def test_token_ids(llama, tmp_path, name):
    """Those of llama.cpp, and of transformers, which llama.cpp's source has beside some vocabularies."""
    compare_ids(llama, metadata_of(name), tmp_path)
    answers = Path(f"{vocabulary(name)}.out")
    if answers.is_file():
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for text, line in zip(known_texts(name), answers.read_text().splitlines(), strict=True):
            assert tokenizer.encode(text, add_special_tokens=False).ids == [int(one) for one in line.split()], text


@pytest.mark.parametrize("cut", _CUTS if WHOLE else ["gpt-4o"])
def test_words_are_cut_as_llama_cpp_does(llama, tmp_path, cut):
    compare_ids(llama, metadata_of("gpt-2") | {"tokenizer.ggml.pre": cut}, tmp_path)


def test_special_tokens_of_phi_3(llama, tmp_path):
    """Spaces after them are theirs. (llama.cpp takes `</s>` for special in any vocabulary, in Qwen's too, where it is a word.)"""
    compare_ids(llama, metadata_of("phi-3"), tmp_path, [PHI_3, "<|user|>", "x<|user|>  ", " <|end|> <|end|>"])


def test_gemma_adds_no_space(llama, tmp_path):
    compare_ids(llama, metadata_of("llama-spm") | {"tokenizer.ggml.add_space_prefix": False}, tmp_path)
