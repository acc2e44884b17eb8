"""From what a task gives to batches: tokens, order, and who writes them."""
