"""03: plan what is missing, see that the teacher can do the task, ask it, keep every answer; or bring your own rows."""

from slm.generate.batch import Generated, estimate, generate, save_prompts
from slm.generate.compare import acceptance, feasibility, spending
from slm.generate.plan import Request, grid, label_values, languages, plan, seed_rows

__all__ = [
    "Generated", "Request", "acceptance", "estimate", "feasibility", "generate", "grid", "label_values", "languages", "plan",
    "save_prompts", "seed_rows", "spending",
]  # fmt: skip
