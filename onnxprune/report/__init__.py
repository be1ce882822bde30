"""Reports: one frozen ``Report``, printed as tables or as JSON."""
