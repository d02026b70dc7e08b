"""Measurement: how good a model is, and how far it lies from the one it was made from."""

from .cache import CacheQuality, cache_types, evaluate_cache
from .encoders import EncoderQuality, compare_pooled, pooled
from .quality import evaluate, evaluate_cache_files, evaluate_files
from .samples import Sample, samples
from .scores import Comparison, Quality, TokenScores, compare, summarise
from .table import render, render_cache, render_tasks
from .zeroshot import TaskReport, evaluate_task_files, evaluate_tasks

__all__ = ["CacheQuality", "Comparison", "EncoderQuality", "Quality", "Sample", "TaskReport", "TokenScores", "cache_types",
           "compare", "compare_pooled", "evaluate", "evaluate_cache", "evaluate_cache_files", "evaluate_files",
           "evaluate_task_files", "evaluate_tasks", "pooled", "render", "render_cache", "render_tasks", "samples",
           "summarise"]
