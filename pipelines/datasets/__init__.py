"""Public data sets, one a file, made into rows."""
