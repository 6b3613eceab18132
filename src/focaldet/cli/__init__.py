"""The command ``focaldet``: it reads arguments and calls the library.

Each subcommand is a module with three names: ``SUMMARY``, ``add_arguments`` and ``run``. None of them
imports torch before ``run`` is called, so ``focaldet --help`` is quick.
"""

from focaldet.cli._main import main

__all__ = ["main"]
