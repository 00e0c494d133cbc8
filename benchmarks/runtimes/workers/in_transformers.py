"""Transformers itself: a folder by `from_pretrained`, by `flashnorm.load`, left on the disk, in a Trainer."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments


class Model:
    """A model of Transformers, and its own `generate`."""

    gains = None

    def __init__(self, model: PreTrainedModel):
        self.model = model
        names = ("transformers", "torch", "accelerate")
        self.version = ", ".join(f"{name} {version(name)}" for name in names)

    def logits(self, ids: list[int]) -> np.ndarray:
        """By one call."""
        return self.model(input_ids=torch.tensor([ids])).logits[0].float().numpy()

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Greedy."""
        output = self.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        return output[0, len(ids) :].tolist()


class Trained(Model):
    """Logits by `Trainer.predict`."""

    def __init__(self, model: PreTrainedModel, scratch: Path):
        super().__init__(model)
        options = TrainingArguments(str(scratch / "trainer"), use_cpu=True, report_to=[], per_device_eval_batch_size=1)
        self.trainer = Trainer(model, options)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of a data set with one text."""
        rows: Any = [{"input_ids": ids}]
        return np.asarray(self.trainer.predict(rows).predictions)[0]


def load(variant: str, folder: Path, form: str, scratch: Path) -> Model:
    """`variant` says by what: "from_pretrained", "flashnorm.load", either with "on the disk", or "Trainer"."""
    torch.set_grad_enabled(False)
    options: dict[str, Any] = {"dtype": torch.float32}
    if "disk" in variant:
        options |= {"device_map": {"": "disk"}, "offload_folder": str(scratch / "offloaded")}
    if "flashnorm.load" in variant and form != "source":
        import flashnorm

        model = flashnorm.load(folder, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return Trained(model, scratch) if variant == "Trainer" else Model(model)
