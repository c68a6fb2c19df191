"""The version of this package, as files that it writes name it."""

__version__ = "0.1.0"


def made_by_another(maker: object) -> str:
    """Say that another version of this package made something; `maker` is None where versions were not written yet."""
    return f"made by version {'before 0.1.0' if maker is None else maker} of edit_compile, this is version {__version__}"
