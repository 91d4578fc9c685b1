"""`python -m earnest` is the `earnest` command."""

from earnest.cli.main import main

main()
