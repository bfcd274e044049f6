"""Work over whole archives."""
