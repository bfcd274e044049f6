"""Copies of model directories: what says what a model is, and no more."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..model.encoders import OLD_TEMPLATE
from .encoders import PROCESSORS
from .quantised import OLD_SETTINGS
from .rewrite import OTHERS, TEXTS, copy_texts
from .weight_files import SHARDS, weight_files


def copy_model(model_dir: Path, work: Path) -> None:
    """Copy configuration, weights, tokenizer and processors; encoders beside the model are left out. Raises `NotFoundError`."""
    for path in weight_files(model_dir):
        shutil.copyfile(path, work / path.name)
    copy_texts(model_dir, work, ("config.json", SHARDS, OLD_SETTINGS, *PROCESSORS, OLD_TEMPLATE, *TEXTS, *OTHERS))
