"""Text: where it comes from, how it becomes windows of tokens, and what a model writes itself."""

from .generate import fast_dtype, self_generated
from .sources import load_text
from .windows import calibration_and_held_out, fingerprint, split, tokens_from_text

__all__ = ["calibration_and_held_out", "fast_dtype", "fingerprint", "load_text", "self_generated", "split",
           "tokens_from_text"]
