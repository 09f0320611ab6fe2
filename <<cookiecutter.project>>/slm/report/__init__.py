"""Tables, plots, the reports of 02 and 06, and the model card."""
