"""Tasks to evaluate on, one file each: published sets of problems."""
