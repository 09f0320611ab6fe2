"""`python -m slm`: the commands of the loop."""

from slm.cli import main

main()
