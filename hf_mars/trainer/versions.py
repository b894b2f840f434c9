"""The transformers versions that the integration is for."""

from importlib.metadata import version

# 5.3 is the first version whose Trainer looks optimizers up in a table of handlers and whose training loop has the
# shape that MarsTrainer hooks into.
SUPPORTED = "transformers>=5.3,<6"


def check_transformers(installed: str | None = None) -> None:
    """Refuse a transformers version that the integration is not for.

    Args:
        installed: the version to judge; None: that of the installed transformers.

    Raises:
        ImportError: the version is not supported. The message names it and those that are.
    """
    from packaging.requirements import Requirement  # here: hf_mars alone imports nothing but the standard library
    from packaging.version import Version

    installed = installed or version("transformers")
    if not Requirement(SUPPORTED).specifier.contains(Version(installed).base_version):
        raise ImportError(f"hf_mars needs {SUPPORTED}, but transformers {installed} is installed")
