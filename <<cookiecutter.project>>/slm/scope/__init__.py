"""01: is a fine-tune right, of which model, and what exactly is the task."""

from slm.scope.decide import Decision, decide, facts
from slm.scope.shortlist import longest_row, shortlist
from slm.scope.spec import require, task_text, write_spec
