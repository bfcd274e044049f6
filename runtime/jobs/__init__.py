"""Jobs over whole archives of documents."""
