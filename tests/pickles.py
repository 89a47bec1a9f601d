"""Model folders whose weights are pickles that leave a mark when they are read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def pickle_weights(folder: Path, kind: str = "legacy") -> Path:
    """Put a pickle in the place of a folder's weights; gives the file that reading it would make."""
    mark = folder / "read"
    weights = folder / "model.safetensors"
    honest = load_file(weights)
    weights.unlink()
    if kind == "legacy":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    elif kind == "zip":
        torch.save({"lm_head.weight": Payload(mark)}, folder / "pytorch_model.bin")
    elif kind == "honest":
        torch.save(honest, folder / "pytorch_model.bin")
    elif kind == "sharded":
        torch.save({"a": Payload(mark)}, folder / "pytorch_model-00001-of-00001.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(honest, "pytorch_model-00001-of-00001.bin")}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif kind == "index":
        torch.save({"a": Payload(mark)}, folder / "weights.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(honest, "weights.bin")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        assert kind == "disguised"
        weights.write_bytes(pickle.dumps(Payload(mark)))
    return mark


KINDS = ("legacy", "zip", "honest", "sharded", "index", "disguised")
