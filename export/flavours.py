"""What an ONNX decoder that a bundle is written as can be."""

from __future__ import annotations

from enum import StrEnum


class Flavour(StrEnum):
    """For whom the graph is."""

    PORTABLE = "portable"  # any runtime: standard operators; Optimum's layout
    GENAI = "genai"  # onnxruntime-genai: the operators of ONNX Runtime


class WeightForm(StrEnum):
    """How the weights of a portable graph are stored."""

    STORED = "stored"  # in the bundle's bits
    FLOAT32 = "float32"
    FLOAT16 = "float16"  # and widened when they are used
