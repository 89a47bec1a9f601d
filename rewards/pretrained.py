"""Models of transformers, read without running anything that comes with them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

WEIGHTS = ".safetensors"


def read_pretrained(auto: Any, source: str | Path, **options: Any) -> Any:
    """What ``auto.from_pretrained(source, **options)`` gives, of weights in safetensors alone, and without code of the model's.

    Args:
        auto: a class of transformers, such as ``AutoModelForCausalLM``.
        source: a folder that ``save_pretrained`` wrote, or a name on the hub.
        options: further ones.

    Raises:
        ValueError: there is no such model; or its weights are pickles, which could run any code.
    """
    from safetensors import SafetensorError

    _check_files(Path(source))
    try:
        return auto.from_pretrained(source, use_safetensors=True, trust_remote_code=False, **options)
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"its weights are not {WEIGHTS} as they should be: {error}") from error


def _check_files(folder: Path) -> None:
    """Raises ValueError: a model's folder has its weights in other files than safetensors."""
    named = {
        name
        for index in folder.glob(f"*{WEIGHTS}.index.json")
        for name in json.loads(index.read_text()).get("weight_map", {}).values()
        if not name.endswith(WEIGHTS)
    }
    if not any(folder.glob(f"model*{WEIGHTS}*")):
        named = {path.name for path in folder.glob("pytorch_model*.bin")}
    if named:
        raise ValueError(
            f"its weights are in {min(named)}, a pickle, which could run any code; where you trust it, load it once with "
            f"transformers and save_pretrained it to another folder, which makes {WEIGHTS} of it"
        )
