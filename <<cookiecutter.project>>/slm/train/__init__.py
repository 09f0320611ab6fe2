"""Training: the recipe's names become TRL's, PEFT's or Unsloth's; rows become tokens; a run leaves an adapter and a record."""

from slm.train.encode import Example, encode, load_tokenizer, preview, stop_ids
from slm.train.recipe import estimate, import_trainer, in_force, lora_arguments, recipe_hash, sft_arguments
from slm.train.sft import train, training_rows
