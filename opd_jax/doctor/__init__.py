"""Whether a student, a teacher and a config belong together: examine.py runs the checks, static.py,
memory.py and rollouts.py hold one function `check_NAME` for each."""
