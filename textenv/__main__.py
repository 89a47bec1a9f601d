"""`python -m textenv` is `textenv`."""

from textenv.cli import main

main()
