"""Who answers a prompt: every model has a name, a fingerprint and `answer(prompts) -> answers`, in order."""

from slm.models.base import Answer, Model, Prompt, alone, base_folder, base_hash, larger, student
from slm.models.cache import cached
