"""The MARS optimizers. Needs torch alone."""

from .adamw_state import from_adamw, to_adamw
from .groups import ParameterRole, parameter_roles
from .variants import MarsAdamW, MarsLion, MarsShampoo

__all__ = ["MarsAdamW", "MarsLion", "MarsShampoo", "ParameterRole", "from_adamw", "parameter_roles", "to_adamw"]
