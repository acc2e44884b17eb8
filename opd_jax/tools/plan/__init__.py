"""`opd plan`: what a run would take of machines that are not here: memory, time and money, from
what XLA makes of its programs for them."""
