"""MARS in ms-swift without the prefix `python -m hf_mars`.

swift sft --external_plugins ms_swift_plugin.py --optimizer mars_adamw [--optim_args gamma=0.05 …]

ms-swift reads a plugin after its command line, too late for another value of --optim; its own --optimizer it looks up
when the trainer is made.
"""

from swift.optimizers import OptimizerCallback, optimizers_map
from transformers.training_args import OptimizerNames

import hf_mars  # noqa: F401 (registers mars_adamw, mars_lion, mars_shampoo and mars_m)


class MarsOptimizerCallback(OptimizerCallback):
    """The Trainer's own way from `optim` and `optim_args` to an optimizer, with the name of --optimizer."""

    def create_optimizer(self, model=None):
        self.args.optim = OptimizerNames(self.args.optimizer)
        return super().create_optimizer(model)


for name in ("mars_adamw", "mars_lion", "mars_shampoo", "mars_m"):
    optimizers_map[name] = MarsOptimizerCallback
