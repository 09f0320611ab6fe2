"""04: gates, duplicates, leakage, balance, split; every rejected row is kept with its reason."""

from slm.curate.accept import Curated, curate
from slm.curate.coverage import coverage
from slm.curate.funnel import plot_funnel
from slm.curate.split import split_file, split_rows
from slm.curate.tokens import token_counter

__all__ = ["Curated", "coverage", "curate", "plot_funnel", "split_file", "split_rows", "token_counter"]
