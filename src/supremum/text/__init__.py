"""Text: where it comes from, and how it becomes windows of tokens."""

from .sources import load_text
from .windows import calibration_and_held_out, fingerprint, split, tokens_from_text

__all__ = ["calibration_and_held_out", "fingerprint", "load_text", "split", "tokens_from_text"]
