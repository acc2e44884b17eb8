"""The commands beside `opd train`, and what only they need."""
