"""07: why rows fail, which failures belong together, and which rows would mend them."""

from slm.repair.causes import CAUSES, Finding, diagnose, plot_causes, table
from slm.repair.clusters import Cell, Cluster, Pattern, cluster_table, clusters, rows_table
from slm.repair.evidence import against_training, examine
from slm.repair.load import load_failures, read_report, trained_labels, with_rows
from slm.repair.plan import from_repair, make_plan, next_step, plan_table, read_plan, same_failures, save_plan

__all__ = [
    "CAUSES", "Cell", "Cluster", "Finding", "Pattern", "against_training", "cluster_table", "clusters", "diagnose",
    "examine", "from_repair", "load_failures", "make_plan", "next_step", "plan_table", "plot_causes", "read_plan",
    "read_report", "rows_table", "same_failures", "save_plan", "table", "trained_labels", "with_rows",
]  # fmt: skip
