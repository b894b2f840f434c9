"""The transformers versions that the integration is for."""

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
    # Here: every Python that starts with HF_MARS=1 imports hf_mars, which takes milliseconds and no other package.
    from importlib.metadata import version

    from packaging.requirements import Requirement
    from packaging.version import Version

    installed = installed or version("transformers")
    if not Requirement(SUPPORTED).specifier.contains(Version(installed).base_version):
        raise ImportError(f"hf_mars needs {SUPPORTED}, but transformers {installed} is installed")
