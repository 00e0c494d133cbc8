"""Transformers itself: by `from_pretrained` or `flashnorm.load`, on the disk, in a pipeline or Trainer, with PEFT."""

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, pipeline

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
STEPS = 3


class Model:
    """A model of Transformers, and its own `generate`."""

    gains = None

    def __init__(self, model: Any, note: str = ""):
        self.model, self.note = model, note
        names = ("transformers", "torch", "accelerate")
        self.version = ", ".join(f"{name} {version(name)}" for name in names)

    def logits(self, ids: list[int]) -> np.ndarray:
        """By one call."""
        return self.model(input_ids=torch.tensor([ids])).logits[0].float().numpy()

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Greedy."""
        mask = torch.ones(1, len(ids), dtype=torch.long)
        output = self.model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=tokens, **GREEDY)
        return output[0, len(ids) :].tolist()


class Pipeline(Model):
    """Tokens by a pipeline, out of a text."""

    def __init__(self, folder: Path, options: dict[str, Any]):
        self.pipeline: Any = pipeline("text-generation", model=str(folder), **options)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        super().__init__(self.pipeline.model)

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """The ids as a text."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        (found,) = self.pipeline(text, return_tensors=True, max_new_tokens=tokens, **GREEDY)
        return found["generated_token_ids"][-tokens:]


class Trained(Model):
    """Logits by `Trainer.predict`; a copy is trained on other ids, and its losses are the note."""

    def __init__(self, model: PreTrainedModel, scratch: Path):
        options = TrainingArguments(
            str(scratch / "trainer"),
            use_cpu=True,
            report_to=[],
            per_device_eval_batch_size=1,
            per_device_train_batch_size=1,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            optim="sgd",
            learning_rate=1e-3,
        )
        ids = list(range(3, 99))
        rows: Any = [{"input_ids": ids, "labels": ids}] * STEPS
        with torch.enable_grad():
            trainer = Trainer(copy.deepcopy(model), options, train_dataset=rows)
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        super().__init__(model, "losses " + ", ".join(f"{loss:.3f}" for loss in losses))
        self.trainer = Trainer(model, options)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of a data set with one text."""
        rows: Any = [{"input_ids": ids}]
        return np.asarray(self.trainer.predict(rows).predictions)[0]


def adapted(model: PreTrainedModel, folder: Path, form: str, scratch: Path) -> Any:
    """A model with a LoRA of random numbers: the source makes it, a converted model gets it converted."""
    from peft import LoraConfig, PeftModel, get_peft_model

    made, mine = scratch.parent / "source" / "adapter", scratch / "adapter"
    if form == "source":
        torch.manual_seed(0)
        # Of about a tenth of the weights' size.
        config = LoraConfig(target_modules="all-linear", r=8, lora_alpha=1, init_lora_weights=False)
        get_peft_model(copy.deepcopy(model), config).save_pretrained(made)
    else:
        import flashnorm

        flashnorm.convert_adapter(made, folder.parent / "source", mine, folded=folder)
    return PeftModel.from_pretrained(model, mine)


def placement(variant: str, folder: Path, scratch: Path) -> dict[str, Any]:
    """Arguments that leave all of a model on the disk, or half of it."""
    if not variant.endswith((", disk", ", auto")):
        return {}
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    where = (
        {"device_map": "auto", "max_memory": {"cpu": size // 2}} if "auto" in variant else {"device_map": {"": "disk"}}
    )
    return where | {"offload_folder": str(scratch / "offloaded")}


def load(variant: str, folder: Path, form: str, scratch: Path) -> Model:
    """`variant` is "pipeline", "Trainer", "PEFT", or by what it is loaded, and ", disk" or ", auto"."""
    torch.set_grad_enabled(False)
    options: dict[str, Any] = {"dtype": torch.float32, **placement(variant, folder, scratch)}
    if variant == "pipeline":
        return Pipeline(folder, options)
    if "flashnorm.load" in variant and form != "source":
        import flashnorm

        return Model(flashnorm.load(folder, **options))
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    if variant == "Trainer":
        return Trained(model, scratch)
    if variant == "PEFT":
        found = Model(adapted(model, folder, form, scratch))
        found.version += f", peft {version('peft')}"
        return found
    on_disk = sum(place == "disk" for place in getattr(model, "hf_device_map", {}).values())
    notes = [f"{len(told['missing_keys'])} weights said to be missing"] if told["missing_keys"] else []
    return Model(model, ", ".join(notes + ([f"{on_disk} modules on the disk"] if on_disk else [])))
