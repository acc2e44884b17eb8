"""What settings are refused: what cannot run, cannot mean what it says, or would not be read.

`rule.py` has the form of a rule, `objective.py` those of an objective alone, `run.py` those of a
whole run. What needs the models or the data is checked by `build.py` and `doctor/`.
"""
