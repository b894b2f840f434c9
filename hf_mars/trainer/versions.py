"""Which transformers versions the integration is for."""

from importlib.metadata import version

SUPPORTED = "transformers>=5.3,<6"


def check_transformers(installed: str | None = None) -> None:
    """Raise an ImportError that says which versions work, unless ``installed`` (default: what is installed) is one.

    5.3 is the first version whose Trainer looks optimizers up in a table of handlers and whose training loop has the
    shape that MarsTrainer hooks into.
    """
    from packaging.version import Version  # here: hf_mars alone imports nothing but the standard library

    installed = installed or version("transformers")
    if not Version("5.3") <= Version(Version(installed).base_version) < Version("6"):
        raise ImportError(f"hf_mars needs {SUPPORTED}, but transformers {installed} is installed")
