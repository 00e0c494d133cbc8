"""vLLM plugin: makes FlashNorm checkpoints load like any other (entry point `vllm.general_plugins`).

* For ordinary models, the wrapped functions of vLLM look for a key in the config, do not find it, and do nothing.
* The norms that the config names are built without weight. vLLM still requires every other weight that it requires. It
  does not notice that the files lack a linear layer, so the plugin checks that.
* LoRA adapters are looked at when they are loaded: those of the source on a folded model, and the other way round, are
  refused.
* A checkpoint without FlashNorm's key is examined after vLLM has refused it: does it lack exactly the foldable norms?
* vLLM loads plugins in each of its processes, so everything here is done in each of them.

`plugin` wraps functions of vLLM, `norms` builds norms without weight, `files` examines the checkpoint, and `rules` has
the decisions that do not need vLLM. `fused` runs linear layers on flashnorm's kernels if asked to. `compare` is a
command.
"""

from flashnorm.integrations.vllm.plugin import register

__all__ = ["register"]
