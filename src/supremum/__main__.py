"""`python -m supremum`, which is what torchrun starts."""

from .cli import main

main()
