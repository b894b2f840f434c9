"""axolotl's door: `plugins: [hf_mars.axolotl.MarsPlugin]` in its YAML file makes MARS's names values of `optimizer`.

axolotl starts its training as new processes, and loads plugins in each of them before it validates the file.
examples/axolotl.yaml is a complete one.
"""

from axolotl.integrations.base import BasePlugin


class MarsPlugin(BasePlugin):
    """Nothing is left to do: importing this module has imported hf_mars, which registers the names.

    `optimizer` and `optim_args` go to the `optim` and `optim_args` of transformers' TrainingArguments.
    """
