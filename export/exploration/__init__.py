"""`motet export --search`: which bits and values are worth their bytes."""
