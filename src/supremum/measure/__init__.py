"""Measurement: how good a model is, and how far it lies from the one it was made from."""

from .encoders import EncoderQuality, compare_pooled, pooled
from .quality import evaluate, evaluate_files
from .samples import Sample, samples
from .scores import Comparison, Quality, TokenScores, compare, summarise
from .table import render

__all__ = ["Comparison", "EncoderQuality", "Quality", "Sample", "TokenScores", "compare", "compare_pooled",
           "evaluate", "evaluate_files", "pooled", "render", "samples", "summarise"]
