"""Supremum: the best a language model can do on this machine within this budget, reached and proved."""

__version__ = "0.1.0"
