"""The extension modules, none so far. All else is in setup.cfg."""

from setuptools import setup

setup()
