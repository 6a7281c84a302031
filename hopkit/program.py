"""Exported programs in files."""

from __future__ import annotations

import os

import torch

from hopkit.errors import HopkitError


def load_program(path: str | os.PathLike[str]) -> torch.export.ExportedProgram:
    """The program that ``torch.export.save`` wrote to a file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It holds something else, is damaged, or was written by a torch that this one cannot read.
        HopkitError: An op in it is not what it was (`hopkit.LayoutError`).
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)}")
    try:
        return torch.export.load(path)
    except HopkitError:
        raise
    except Exception as error:  # torch raises whatever the damage led to
        raise ValueError(
            f"{os.fspath(path)} is no exported program that torch {torch.__version__} can read (torch.export.save "
            f"writes one): {error}"
        ) from error
