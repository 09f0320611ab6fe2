"""Why a run disappoints: five symptoms, the likely causes of each, tested on what the run left behind."""
