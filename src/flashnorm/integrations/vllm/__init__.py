"""vLLM plugin: a FlashNorm checkpoint loads as any other does (entry point `vllm.general_plugins`).

* Ordinary models: two wrapped functions of vLLM look for a key in the config, find none, and that is all.
* The norms that the config names are built without weight, and nothing else changes: what vLLM requires, it still
  requires. What vLLM itself does not notice is checked here: a linear that is absent from the files.
* A checkpoint without our key is looked at when vLLM has refused it: are exactly the norms absent that can be folded?
* vLLM loads plugins in each of its processes; all that is done here is done in each of them.

`plugin` wraps functions of vLLM, `norms` builds norms without weight, `files` looks at the checkpoint, and `rules` is
what can be decided without vLLM.
"""

from flashnorm.integrations.vllm.plugin import register

__all__ = ["register"]
