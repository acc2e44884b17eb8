"""What a run needs around its steps: evaluation, optimizer, records."""
