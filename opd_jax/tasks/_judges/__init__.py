"""What judges answers in processes of its own, because it may not come back from one: `serve.py` is
what they run, with a judge, a file each, by its path."""
