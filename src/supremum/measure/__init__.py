"""Measurement: how good a model is, and how far it lies from the one it was made from."""

from .cache import CacheQuality, cache_types, evaluate_cache
from .cases import tasks_from
from .encoders import EncoderQuality, compare_pooled, pooled
from .harness import evaluate_harness
from .quality import TextQuality, evaluate, evaluate_cache_files, evaluate_files, evaluate_texts
from .samples import Sample, samples
from .scores import Comparison, Quality, TokenScores, compare, summarise
from .table import render, render_cache, render_harness, render_tasks, render_text
from .zeroshot import TaskReport, evaluate_tasks

__all__ = ["CacheQuality", "Comparison", "EncoderQuality", "Quality", "Sample", "TaskReport", "TextQuality", "TokenScores",
           "cache_types", "compare", "compare_pooled", "evaluate", "evaluate_cache", "evaluate_cache_files", "evaluate_files",
           "evaluate_harness", "evaluate_tasks", "evaluate_texts", "pooled", "render", "render_cache", "render_harness",
           "render_tasks", "render_text", "samples", "summarise", "tasks_from"]
