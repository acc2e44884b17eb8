"""Tasks to train on, one file each: published data sets, and problems that a library makes."""
