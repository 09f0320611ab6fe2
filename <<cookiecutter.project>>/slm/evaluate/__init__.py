"""Baselines first, then the fine-tuned model on the same rows, with intervals, paired tests and release gates."""

from slm.evaluate.baselines import check_sets, choose_shots, load_baselines, require_baselines, run_baseline
from slm.evaluate.baselines import run_baselines, save_baselines, seed_rows, take
from slm.evaluate.candidate import add_files, load_candidate, open_sets, run_candidate, scored_sets
from slm.evaluate.compare import Comparison, compare_results, detectable_difference, gap_closed, paired, seeds
from slm.evaluate.intervals import Metric
from slm.evaluate.metrics import Result, evaluate, measure
from slm.evaluate.preference import Preference, add_rubric, prefer
from slm.evaluate.release import Gate, check, failures, load_report, sign_off
from slm.evaluate.scorers import Score, score_row
