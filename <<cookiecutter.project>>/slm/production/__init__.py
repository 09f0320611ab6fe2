"""The flywheel: logs of the released model, scrubbed, sampled, to evaluation first and to training second."""

from slm.production.drift import drift_table
from slm.production.logs import LogLine, Logs, read_logs
from slm.production.monitor import table, watch
from slm.production.sample import Sample, rows_of, sample, save_sample
from slm.production.scrub import scrub, scrub_logs

__all__ = [
    "LogLine", "Logs", "Sample", "drift_table", "read_logs", "rows_of", "sample", "save_sample", "scrub", "scrub_logs", "table", "watch",
]  # fmt: skip
