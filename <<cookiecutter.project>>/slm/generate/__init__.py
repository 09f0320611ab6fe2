"""03: plan what is missing, ask the teacher for it, keep every answer."""

from slm.generate.batch import Generated, generate, save_prompts
from slm.generate.plan import Request, grid, label_values, plan, seed_rows

__all__ = ["Generated", "Request", "generate", "grid", "label_values", "plan", "save_prompts", "seed_rows"]
