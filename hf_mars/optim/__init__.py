"""The MARS optimizers. Needs torch alone."""

from .groups import ParameterRole, parameter_roles
from .variants import MarsAdamW, MarsLion, MarsShampoo

__all__ = ["MarsAdamW", "MarsLion", "MarsShampoo", "ParameterRole", "parameter_roles"]
