"""04: gates, duplicates, leakage, balance, split; every rejected row is kept with its reason."""

from slm.curate.accept import Curated, curate
from slm.curate.coverage import cells, coverage
from slm.curate.plots import contradictions, heat_map, histogram, plot_funnel
from slm.curate.split import split_file
from slm.curate.tokens import token_counter
from slm.curate.versions import diff, split_table, volume_stage, volume_warning
